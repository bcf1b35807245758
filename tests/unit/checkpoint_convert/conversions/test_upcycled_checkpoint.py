"""How a model is upcycled: copies, noise, random experts, and another round on an MoE."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.model.stages import Part
from tests.support.hf_models import (
    TOKENS,
    assert_import_fails,
    assert_logits,
    edit_tensors,
    load_stock,
    megatron_tensors_of,
    our_logits,
    stock_logits,
    tensors_of,
    write_export,
)

MLP = "model.layers.2.mlp."


def upcycled(qwen2: Path, folder: Path, start: Start) -> MegatronReader:
    hf_to_mcore(qwen2, folder, NewExperts(3), start=start)
    return MegatronReader(folder)


def expert(model: MegatronReader, number: int) -> dict[str, Tensor]:
    """Gate, up and down of an expert, an FFN dimension a row: [ffn, hidden]."""
    gate, up, down = (model.read(f"{MLP}experts.{number}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return {"gate": gate, "up": up, "down": down.T}


def test_nothing_but_new_experts_is_changed(qwen2: Path, tmp_path: Path) -> None:
    copied = upcycled(qwen2, tmp_path / "copied", Start())
    starts = {"noise": Start(noise=0.1), "random": Start("random")}
    for name, start in (starts | {"seed": Start(seed=7)}).items():
        other = upcycled(qwen2, tmp_path / name, start)
        for piece in copied.pieces:
            same = torch.equal(copied.read_piece(piece), other.read_piece(piece))
            assert same == (piece.part is not {"seed": Part.ROUTER}.get(name, Part.NEW_EXPERTS)), (name, piece)
    up = [MegatronReader(tmp_path / "random").read(f"{MLP}experts.{number}.up_proj.weight") for number in (1, 2)]
    assert not torch.equal(*up) and up[0].std().item() == pytest.approx(0.02, rel=0.1)  # Qwen2's initializer_range


def test_new_experts_may_be_copies_of_another_models_ffns(qwen2: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(qwen2, tmp_path / "trained"))

    def edit(change: Callable[[dict[str, Tensor]], object]) -> None:
        for file in trained.glob("*.safetensors"):
            edit_tensors(file, change)

    edit(lambda tensors: [tensor.mul_(1.5) for name, tensor in tensors.items() if ".mlp." in name])
    model = upcycled(qwen2, tmp_path / "out", Start(ffns_of=str(trained)))
    assert all(torch.equal(tensor, 1.5 * expert(model, 0)[name]) for name, tensor in expert(model, 3).items())
    edit(lambda tensors: tensors.pop(f"{MLP}up_proj.weight", None))
    with pytest.raises(UserError, match="up_proj"):
        upcycled(qwen2, tmp_path / "refused", Start(ffns_of=str(trained)))


def test_noise_is_a_fraction_of_the_weights_standard_deviation(qwen2: Path, tmp_path: Path) -> None:
    model = upcycled(qwen2, tmp_path / "out", Start(noise=0.25))
    original = expert(model, 0)
    noises = [{name: expert(model, j)[name] - original[name] for name in original} for j in (1, 2, 3)]
    for noise in noises:
        for names in (("gate", "up"), ("down",)):  # gate and up are one tensor
            weights, added = (torch.cat([its[name] for name in names]).std().item() for its in (original, noise))
            assert added == pytest.approx(0.25 * weights, rel=0.1)
    assert not torch.equal(noises[0]["up"], noises[1]["up"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": Start("random", noise=0.1)}, "--new-experts random.*--expert-noise"),
        ({"experts": NewExperts(4, topk=6)}, "top-6 .* 5"),
        ({"experts": NewExperts(4, moe_layers=[1, 4])}, "layer 4.* 0 to 3"),
        ({"experts": NewExperts(4, moe_layers=[])}, "--moe-layers"),
        ({"experts": NewExperts(4, moe_every_k_layers=5)}, "--moe-every-k-layers .*1 to 4 .* 5"),
        ({"experts": NewExperts(4, moe_layers=[1], moe_every_k_layers=2)}, "--moe-layers and --moe-every-k-layers"),
    ],
)
def test_invalid_starts_and_experts_are_rejected(qwen2: Path, tmp_path: Path, options: dict, message: str) -> None:
    assert_import_fails(qwen2, tmp_path, message, **options)
    assert not list(tmp_path.iterdir())


def test_routers_are_xavier_normal_and_depend_on_the_seed_only(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "all", NewExperts(63))
    hf_to_mcore(qwen2, tmp_path / "some", NewExperts(63, moe_layers=[1, 3]))
    hf_to_mcore(qwen2, tmp_path / "other", NewExperts(63), start=Start(seed=1))
    key = "decoder.layers.3.mlp.router.weight"
    router, some, other = (megatron_tensors_of(tmp_path / name)[key] for name in ("all", "some", "other"))
    assert router.std().item() == pytest.approx((2 / (64 + 32)) ** 0.5, rel=0.1)
    assert torch.equal(router, some)
    assert not torch.equal(router, other)
    assert not torch.equal(router, megatron_tensors_of(tmp_path / "all")[key.replace("3", "2")])


@pytest.mark.parametrize(
    ("layers", "expected"), [({"moe_layers": [2, 0]}, (0, 2)), ({"moe_every_k_layers": 2}, (1, 3))]
)
def test_an_upcycled_model_with_dense_layers_equals_the_dense_one(qwen2, tmp_path, layers, expected) -> None:
    model = load_stock(write_export(qwen2, tmp_path, NewExperts(4, **layers)), "Qwen2MoeForCausalLM")
    assert ModelSpec.read(tmp_path / "megatron").moe == MoeSpec(4, 2, expected)
    assert model.config.mlp_only_layers == [i for i in range(4) if i not in expected]
    assert_logits(stock_logits(model), qwen2)


ARCHITECTURES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {"tie_word_embeddings": True}, "Qwen3ForCausalLM": {}}
ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight")


def second_round(first: Path, tmp_path: Path, number: int, noise: float = 0.0) -> tuple[MoeSpec | None, dict, dict]:
    """A further round on an export: the shape, and the tensors of both exports; the second computes what we do."""
    export = write_export(first, tmp_path / "second", NewExperts(number), noise=noise)
    assert_logits(our_logits(tmp_path / "second" / "megatron"), export)
    return ModelSpec.read(tmp_path / "second" / "megatron").moe, tensors_of(first), tensors_of(export)


@pytest.fixture(params=ARCHITECTURES)
def first_round(request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """An export with 2 new experts that differ from the original one, as after stage 2."""
    return write_export(
        make_model(request.param, **ARCHITECTURES[request.param]), tmp_path / "first", NewExperts(2), noise=0.5
    )


def test_all_earlier_experts_are_original_and_new_ones_are_copies_of_expert_0(first_round, tmp_path) -> None:
    moe, before, after = second_round(first_round, tmp_path, 4)
    assert moe == MoeSpec(4, 2, (0, 1, 2, 3), num_original_experts=3)
    for name, tensor in before.items():
        kept = after[name][:3] if name.endswith(ROUTERS) else after[name]
        assert torch.equal(kept, tensor), name
    for name in after.keys() - before.keys():
        expert = next(number for number in (3, 4, 5, 6) if f"experts.{number}." in name)
        assert torch.equal(after[name], before[name.replace(f"experts.{expert}.", "experts.0.")]), name
    for name in before:
        if name.endswith(ROUTERS):
            assert after[name].shape[0] == 7
            noise = after[name][3:] - after[name][0]
            assert 0 < noise.std() < 0.02 * after[name][0].std() + 0.01
            assert not torch.equal(noise[0], noise[1])


def test_new_experts_compete_only_with_expert_0(first_round: Path, tmp_path: Path) -> None:
    """Tokens whose top-k omits expert 0, or is dominated by it, are computed as before the round."""
    direction = torch.linspace(-1, 1, 32)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(ROUTERS):
                tensor.mul_(0.01)
                tensor[0] = direction * 1e6
            elif "post_attention_layernorm" in name:
                tensor.fill_(1)

    edit_tensors(first_round, change)
    hf_to_mcore(first_round, tmp_path / "second", NewExperts(2))
    layers = load_stock(first_round)(TOKENS, output_router_logits=True).router_logits
    # The token's sign decides whether expert 0 leads; tokens of both kinds are there.
    assert 0 < torch.stack([scores.argmax(-1) == 0 for scores in layers]).float().mean() < 1
    assert_logits(our_logits(tmp_path / "second"), first_round)


def test_layers_without_experts_stay_without(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_export(
        make_model("Qwen3ForCausalLM"), tmp_path / "first", NewExperts(2, moe_layers=[1, 3]), noise=0.5
    )
    assert second_round(folder, tmp_path, 1)[0] == MoeSpec(1, 2, (1, 3), num_original_experts=3)
    for layers in ({"moe_layers": [1]}, {"moe_every_k_layers": 2}):
        with pytest.raises(UserError, match="--moe-layers and --moe-every-k-layers"):
            hf_to_mcore(folder, tmp_path / "other", NewExperts(1, **layers))


def test_a_checkpoint_holds_the_ffn_once_and_an_export_has_it_in_every_place(make_model, tmp_path) -> None:
    """Experts 0 and 1 of the export equal the dense FFN, each with its own router row."""
    dense = make_model("Qwen2ForCausalLM")
    spec = hf_to_mcore(dense, tmp_path / "one", NewExperts(4), start=Start(noise=0.5))
    assert spec.moe == MoeSpec(4, 2, (0, 1, 2, 3))
    spec = hf_to_mcore(dense, tmp_path / "two", NewExperts(4, original_copies=2), start=Start(noise=0.5))
    assert spec.moe == MoeSpec(4, 2, (0, 1, 2, 3), original_copies=2)
    keys = [TorchDistReader(tmp_path / name / "release").keys for name in ("one", "two")]
    assert set(keys[0]) == set(keys[1])
    mcore_to_hf(tmp_path / "two", tmp_path / "hf")
    before, after = tensors_of(dense), tensors_of(tmp_path / "hf")
    for name in (name for name in before if ".mlp." in name):
        copies = [name.replace("mlp.", f"mlp.experts.{place}.") for place in (0, 1, 2)]
        assert [torch.equal(after[copy], before[name]) for copy in copies] == [True, True, False]
    router = after["model.layers.0.mlp.gate.weight"]
    assert router.shape[0] == 6 and not torch.equal(router[0], router[1])
    assert_logits(our_logits(tmp_path / "two"), tmp_path / "hf")
    assert (our_logits(tmp_path / "two") - stock_logits(dense)).abs().max() > 1e-3  # its new experts differ


def test_an_import_holds_copies_once_again(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Equal experts are found by their bits, with or without the key of config.json."""
    folder = write_export(
        make_model("LlamaForCausalLM"), tmp_path / "first", NewExperts(2, original_copies=2), noise=0.5
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config.pop("original_copies"), config["num_original_experts"], config["num_local_experts"]) == (2, 2, 4)
    (folder / "config.json").write_text(json.dumps(config))
    moe, before, after = second_round(folder, tmp_path, 1, noise=0.5)
    assert moe == MoeSpec(1, 2, (0, 1, 2, 3), num_original_experts=3, original_copies=2)
    for name, tensor in before.items():
        assert torch.equal(after[name][:4] if name.endswith(ROUTERS) else after[name], tensor), name
    # One bit makes them different.
    name = "model.layers.3.block_sparse_moe.experts.1.w2.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(torch.uint8)[0, 0].bitwise_xor_(1))
    spec = hf_to_mcore(folder, tmp_path / "other", NewExperts(1))
    assert spec.moe == MoeSpec(1, 2, (0, 1, 2, 3), num_original_experts=4)


def test_an_upcycled_model_without_training_is_not_dense(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """All its experts are equal; at most K count as copies, and never all."""
    first = write_export(make_model("LlamaForCausalLM"), tmp_path / "first", NewExperts(1))
    assert second_round(first, tmp_path, 4)[0] == MoeSpec(4, 2, (0, 1, 2, 3), num_original_experts=2)
    spec = hf_to_mcore(tmp_path / "second" / "hf", tmp_path / "third", NewExperts(1))
    assert spec.moe == MoeSpec(1, 2, (0, 1, 2, 3), num_original_experts=5, original_copies=2)


BIAS, UP, DOWN = "model.layers.2.self_attn.k_proj.bias", f"{MLP}up_proj.weight", f"{MLP}down_proj.weight"
NO_BIAS, NORM = "model.layers.0.self_attn.o_proj.bias", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(BIAS), BIAS),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1]}), rf"{UP} .*\[47, 32\].*config.json.*\[48, 32\]"),
        (lambda tensors: tensors.update({NO_BIAS: torch.zeros(32)}), f"source .*{NO_BIAS}"),
        (lambda tensors: tensors[DOWN][3, 5].fill_(torch.nan), f"source: {DOWN} .*NaN"),
        (lambda tensors: tensors[DOWN][3, 5].fill_(torch.inf), f"source: {DOWN} .*NaN"),
        (lambda tensors: tensors[DOWN][3, 5].fill_(-torch.inf), f"source: {DOWN} .*NaN"),
        (lambda tensors: tensors.update({NORM: tensors[NORM].half()}), "float16 .*and float32 .*--dtype"),
        (lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM}.*F32.*I8"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_rejected(source: Path, tmp_path: Path, change, message) -> None:
    edit_tensors(source, change)
    assert_import_fails(source, tmp_path, message)
