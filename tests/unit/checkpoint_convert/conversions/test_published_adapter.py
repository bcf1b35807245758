"""Adapters of the published code are imported as the model they are, and exported unchanged."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_convert.compare.tensors import compare, compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.published_adapter import adapter_to_mcore, mcore_to_adapter
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.mcore.megatron_folder import MegatronReader
from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import TorchDistReader, TorchDistWriter
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.support.hf_models import edit_json, files_of, tensors_of

HIDDEN, FFN, LAYERS, NUM_NEW = 32, 48, [1, 3], 3


PREFIX = "base_model.model.model.layers"


# As PEFT writes it for the published code's MoeConfig.
CONFIG = {
    "auto_mapping": None,
    "aux_loss_coef": None,
    "base_model_name_or_path": "Qwen/Qwen1.5-1.8B",
    "inference_mode": True,
    "init_moe_weights": True,
    "layers_to_transform": LAYERS,
    "lpr_loss_coef": 0.1,
    "num_experts": NUM_NEW + 1,
    "peft_type": "MOE",
    "revision": None,
    "save_all_params": False,
    "task_type": "CAUSAL_LM",
    "topk": 2,
}


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Routers and new experts by the names that PEFT writes: without the adapter's own name."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    tensors = {}
    for i in LAYERS:
        tensors[f"{PREFIX}.{i}.mlp.moe_router_embedding.weight"] = draw(NUM_NEW + 1, HIDDEN)
        for j in range(NUM_NEW):
            for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
                tensors[f"{PREFIX}.{i}.mlp.moe_experts.{j}.{name}_proj.weight"] = draw(*shape)
    return tensors


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor] | None = None, **changes: object) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(random_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
        return folder

    return write


class PublishedLayer(torch.nn.Module):
    """The published code's MoE layer, from its description: row and expert 0 are the base's own FFN."""

    def __init__(self, mlp: torch.nn.Module, adapter: dict[str, Tensor], layer: int, topk: int):
        super().__init__()
        self.mlp, self.topk = mlp, topk
        own = {name.split(".mlp.")[1]: tensor for name, tensor in adapter.items() if f"layers.{layer}." in name}
        self.router = own["moe_router_embedding.weight"]
        self.new = [
            [own[f"moe_experts.{j}.{name}_proj.weight"] for name in ("gate", "up", "down")] for j in range(NUM_NEW)
        ]

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.mlp(x)]
        for gate, up, down in self.new:
            outputs.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        scores = (x @ self.router.T).softmax(dim=-1)
        chosen = scores.topk(self.topk, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return sum(weights[..., k : k + 1] * output for k, output in enumerate(outputs))


@pytest.mark.parametrize("topk", [2, 3])
def test_the_model_computes_what_the_published_code_does(qwen2, write_adapter, tmp_path, topk) -> None:
    from transformers import AutoModelForCausalLM

    spec = adapter_to_mcore(write_adapter(topk=topk), qwen2, tmp_path / "megatron")
    assert spec.moe == MoeSpec(NUM_NEW, topk, tuple(LAYERS))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    published = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for i in LAYERS:
        published.model.layers[i].mlp = PublishedLayer(published.model.layers[i].mlp, random_tensors(), i, topk)
    tokens = torch.randint(0, 99, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = published(tokens).logits, ours(tokens).logits
        dense = AutoModelForCausalLM.from_pretrained(qwen2).eval()(tokens).logits
    assert (a - b).abs().max() < 1e-5
    assert (a - dense).abs().max() > 1e-2


def test_everything_but_routers_and_new_experts_is_the_base(qwen2, write_adapter, tmp_path) -> None:
    adapter_to_mcore(write_adapter(), qwen2, tmp_path / "megatron")
    assert largest_difference(compare_frozen(qwen2, tmp_path / "megatron")) == 0.0
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_to_ours_to_adapter_has_the_same_tensors(make_qwen2, write_adapter, tmp_path, dtype) -> None:
    adapter = write_adapter(random_tensors(dtype), lpr_loss_coef=None)
    adapter_to_mcore(adapter, make_qwen2(dtype), tmp_path / "megatron")
    mcore_to_adapter(tmp_path / "megatron", tmp_path / "again", "Qwen/Qwen1.5-1.8B")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == CONFIG | {"lpr_loss_coef": None}


def test_ours_to_adapter_to_ours_is_bitwise_identical(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "ours", NewExperts(4, topk=3, moe_layers=[0, 2]))
    mcore_to_adapter(tmp_path / "ours", tmp_path / "adapter", "base")
    adapter_to_mcore(tmp_path / "adapter", qwen2, tmp_path / "again")
    assert largest_difference(compare(tmp_path / "ours", tmp_path / "again")) == 0.0
    assert ModelSpec.read(tmp_path / "ours") == ModelSpec.read(tmp_path / "again")
    before, after = files_of(tmp_path / "ours"), files_of(tmp_path / "again")
    assert {name for name in before if before[name] != after[name]} == {"hf/origin.json"}  # where the experts are from


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_other_families_have_adapters_too(architecture: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    base = make_model(architecture)
    hf_to_mcore(base, tmp_path / "ours", NewExperts(2), start=Start("random"))
    mcore_to_adapter(tmp_path / "ours", tmp_path / "adapter", "base")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {name for name in names if "layers.3." in name} == {
        f"{PREFIX}.3.mlp.{name}.weight"
        for name in (
            "moe_router_embedding",
            *(f"moe_experts.{j}.{n}_proj" for j in (0, 1) for n in ("gate", "up", "down")),
        )
    }
    adapter_to_mcore(tmp_path / "adapter", base, tmp_path / "again")
    assert largest_difference(compare(tmp_path / "ours", tmp_path / "again")) == 0.0


def test_few_tensors_are_held_at_a_time(make_qwen2: Callable[..., Path], tmp_path: Path, held_bytes) -> None:
    base = make_qwen2(num_hidden_layers=12)
    largest = max(tensor.nbytes for file in base.glob("*.safetensors") for tensor in load_file(file).values())
    hf_to_mcore(base, tmp_path / "ours", NewExperts(8))
    held_bytes.take_peak()
    mcore_to_adapter(tmp_path / "ours", tmp_path / "adapter", "base")
    assert 0 < held_bytes.take_peak() <= 3 * largest
    adapter_to_mcore(tmp_path / "adapter", base, tmp_path / "again")
    assert 0 < held_bytes.take_peak() <= 3 * largest


def test_names_that_include_the_adapters_name_are_read(qwen2, write_adapter, tmp_path) -> None:
    """As in the published code's memory: moe_experts.default.{j}, moe_router_embedding.default."""
    adapter_to_mcore(write_adapter(), qwen2, tmp_path / "plain")
    named = {re.sub(r"(moe_[a-z_]+)\.", r"\1.default.", name): tensor for name, tensor in random_tensors().items()}
    assert f"{PREFIX}.1.mlp.moe_experts.default.0.up_proj.weight" in named
    assert f"{PREFIX}.1.mlp.moe_router_embedding.default.weight" in named
    adapter_to_mcore(write_adapter(named), qwen2, tmp_path / "named")
    assert largest_difference(compare(tmp_path / "plain", tmp_path / "named")) == 0.0


def parameters_of(base: Path) -> dict[str, Tensor]:
    """The base's tensors by the names that they have in an adapter."""
    mlp = re.compile(rf"(layers\.({'|'.join(map(str, LAYERS))})\.mlp\.)")
    return {f"base_model.model.{mlp.sub(r'\1base_layer.', name)}": tensor for name, tensor in tensors_of(base).items()}


def test_an_adapter_with_all_parameters_replaces_the_base(qwen2, write_adapter, tmp_path) -> None:
    """Under save_all_params the published code trains and saves all parameters; the base's are then the adapter's."""
    all_params = {name.replace("experts.", "experts.default."): t for name, t in random_tensors().items()}
    all_params |= {name: tensor + 1 for name, tensor in parameters_of(qwen2).items()}
    adapter_to_mcore(write_adapter(all_params, save_all_params=True), qwen2, tmp_path / "megatron")
    reader = MegatronReader(tmp_path / "megatron")
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.0.up_proj.weight", "lm_head.weight"):
        original = name.replace("experts.0.", "")
        assert torch.equal(reader.read(name), tensors_of(qwen2)[original] + 1), name
    with pytest.raises(UserError, match="had changed the base's weights too.*moelpr model export"):
        mcore_to_adapter(tmp_path / "megatron", tmp_path / "again", "base")


def test_an_adapter_with_all_parameters_of_the_base_can_be_written_again(qwen2, write_adapter, tmp_path) -> None:
    all_params = random_tensors() | parameters_of(qwen2)
    adapter_to_mcore(write_adapter(all_params, save_all_params=True), qwen2, tmp_path / "megatron")
    mcore_to_adapter(tmp_path / "megatron", tmp_path / "again", "base")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in random_tensors().items())


def test_the_dtype_of_the_base_is_that_of_its_weights_not_of_its_config(source, write_adapter, tmp_path) -> None:
    edit_json(source / "config.json", dtype="bfloat16")
    adapter_to_mcore(write_adapter(), source, tmp_path / "megatron", dtype="bfloat16")
    assert json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_mixed_dtypes_require_a_choice(make_qwen2, write_adapter, tmp_path) -> None:
    """Adapters trained without mixed precision are fp32 on a bf16 base."""
    base = make_qwen2(torch.bfloat16)
    with pytest.raises(UserError, match=r"bfloat16 \(.*\) and float32 \(.*adapter\).*--dtype"):
        adapter_to_mcore(write_adapter(), base, tmp_path / "megatron")
    adapter_to_mcore(write_adapter(), base, tmp_path / "megatron", dtype="float32")
    mcore_to_adapter(tmp_path / "megatron", tmp_path / "again", "base")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in random_tensors().items())


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in random_tensors().items() if key != name}


ROUTER, EXPERT = f"{PREFIX}.3.mlp.moe_router_embedding.weight", f"{PREFIX}.1.mlp.moe_experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (without(ROUTER), {}, ROUTER),
        (without(EXPERT), {}, EXPERT),
        (random_tensors() | {EXPERT: torch.zeros(HIDDEN, FFN - 1)}, {}, r"\[32, 47\].*\[32, 48\]"),
        (random_tensors() | {EXPERT.replace(".2.", ".3."): torch.zeros(1)}, {}, "experts.3.*adapter_config.json"),
        (random_tensors() | {EXPERT.replace("experts.", "experts.default."): torch.zeros(1)}, {}, "experts.default.2"),
        (random_tensors() | {EXPERT: torch.zeros(HIDDEN, FFN, dtype=torch.int8)}, {}, "I8"),
        (None, {"num_experts": 3}, r"router_embedding.weight.*\[4, 32\].*\[3, 32\]"),
        (None, {"num_experts": 1}, "adapter_config.json.*--num-new-experts must be between 1 and 1024, got 0"),
        (None, {"layers_to_transform": [1]}, "layers.3.*adapter_config.json"),
        (None, {"layers_to_transform": [1, 3, 4]}, "adapter_config.json.* 4"),
        (None, {"topk": 1}, "topk .*at least 2.* 1"),
        (None, {"peft_type": "LORA"}, "peft_type .*'MOE'.*'LORA'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_rejected(qwen2, write_adapter, tmp_path, tensors, changes, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adapter_to_mcore(write_adapter(tensors, **changes), qwen2, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_is_not_an_adapter_is_rejected(qwen2, write_adapter, tmp_path) -> None:
    adapter = write_adapter()
    with pytest.raises(UserError, match="adapter.*--save"):
        adapter_to_mcore(adapter, qwen2, adapter / "out", overwrite=True)
    content = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        adapter_to_mcore(adapter, qwen2, tmp_path / "out")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin.*weights_only=True"):
        adapter_to_mcore(adapter, qwen2, tmp_path / "out")
    (adapter / "adapter_config.json").write_text("[]x")
    with pytest.raises(UserError, match="adapter_config.json"):
        adapter_to_mcore(adapter, qwen2, tmp_path / "out")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json"):
        adapter_to_mcore(adapter, qwen2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_suggested_conversion_of_pickled_weights_works(qwen2, write_adapter, tmp_path, monkeypatch) -> None:
    adapter = write_adapter()
    torch.save(random_tensors(), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        adapter_to_mcore(adapter, qwen2, tmp_path / "out")
    advice = str(caught.value).partition(": ")[2]
    monkeypatch.chdir(adapter)
    import safetensors.torch

    exec(advice, {"safetensors": safetensors, "torch": torch})
    adapter_to_mcore(adapter, qwen2, tmp_path / "out")


def test_a_base_that_does_not_fit_is_rejected(qwen2, make_model, write_adapter, tmp_path) -> None:
    with pytest.raises(UserError, match="MixtralForCausalLM.*2 of 4 layers"):
        adapter_to_mcore(write_adapter(), make_model("LlamaForCausalLM"), tmp_path / "out")
    hf_to_mcore(qwen2, tmp_path / "ours", NewExperts(4))
    mcore_to_hf(tmp_path / "ours", tmp_path / "moe")
    with pytest.raises(UserError, match="moe is an MoE.*dense"):
        adapter_to_mcore(write_adapter(), tmp_path / "moe", tmp_path / "out")


def test_nan_and_inf_weights_are_rejected(qwen2: Path, write_adapter: Callable[..., Path], tmp_path: Path) -> None:
    broken = random_tensors()
    broken[EXPERT][3, 4] = float("nan")
    with pytest.raises(UserError, match=f"{EXPERT} .*NaN"):
        adapter_to_mcore(write_adapter(broken), qwen2, tmp_path / "out")
    hf_to_mcore(qwen2, tmp_path / "ours", NewExperts(2))
    state = TorchDistReader(tmp_path / "ours" / "release")
    with TorchDistWriter(tmp_path / "nan") as writer:
        for key in sorted(state.keys):
            tensor = state.read(key).clone()
            writer.write(key, tensor.fill_(float("inf")) if key.endswith("layers.2.mlp.router.weight") else tensor)
        writer.finish({})
    shutil.rmtree(tmp_path / "ours" / "release")
    (tmp_path / "nan").rename(tmp_path / "ours" / "release")
    name = "model.layers.2.mlp.gate.weight .*NaN.*--iteration"
    with pytest.raises(UserError, match=name):
        mcore_to_adapter(tmp_path / "ours", tmp_path / "out", "base")
    with pytest.raises(UserError, match=name):
        mcore_to_hf(tmp_path / "ours", tmp_path / "out", as_delta=True)
    assert not (tmp_path / "out").exists()


def test_a_base_that_training_rounded_has_no_adapter_in_its_own_dtype(make_qwen2, tmp_path: Path) -> None:
    hf_to_mcore(make_qwen2(torch.float32), tmp_path / "rounded", NewExperts(2, original_copies=1), dtype="bfloat16")
    replace(ModelSpec.read(tmp_path / "rounded"), dtype="float32").write(tmp_path / "rounded")  # as after training
    with pytest.raises(UserError, match="base's float32 was rounded: an adapter .*--dtype bfloat16"):
        mcore_to_adapter(tmp_path / "rounded", tmp_path / "adapter", "base")
    mcore_to_adapter(tmp_path / "rounded", tmp_path / "adapter", "base", dtype="bfloat16")


def test_a_model_that_an_adapter_cannot_express_is_rejected(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "dense", None)
    with pytest.raises(UserError, match="is dense.*moelpr model export"):
        mcore_to_adapter(tmp_path / "dense", tmp_path / "out", "base")
    hf_to_mcore(qwen2, tmp_path / "moe", NewExperts(4))
    spec = json.loads((tmp_path / "moe" / "model_spec.json").read_text())
    spec["moe"] |= {"num_original_experts": 2, "num_new_experts": 3}
    (tmp_path / "lifelong").mkdir()
    (tmp_path / "lifelong" / "model_spec.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="2 original experts.*moelpr model export"):
        mcore_to_adapter(tmp_path / "lifelong", tmp_path / "out", "base")
    hf_to_mcore(qwen2, tmp_path / "copies", NewExperts(4, original_copies=2))
    with pytest.raises(UserError, match="2 copies.*moelpr model export"):
        mcore_to_adapter(tmp_path / "copies", tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()
