"""A further round of languages: an exported MoE comes back with more experts, and all it had is original."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.errors import UserError
from moelpr.model_spec import MoeSpec

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 99
ARCHITECTURES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {"tie_word_embeddings": True}, "Qwen3ForCausalLM": {}}
ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight")


@pytest.fixture(params=ARCHITECTURES)
def first_round(request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """An export with 2 new experts that differ from the original one, as after stage 2."""
    return export_first_round(make_model(request.param, **ARCHITECTURES[request.param]), tmp_path)


def export_first_round(dense: Path, tmp_path: Path, **options) -> Path:
    hf_to_mcore(dense, tmp_path / "first", num_new_experts=2, start=Start(noise=0.5), **options)
    mcore_to_hf(tmp_path / "first", tmp_path / "first-hf")
    return tmp_path / "first-hf"


def stock(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return stock(folder)(TOKENS).logits


def our_logits(folder: Path) -> Tensor:
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    from moelpr.model import loading

    with loading.single_process():
        return loading.logits(loading.load_model(folder), TOKENS)


def edit_routers(folder: Path, change: Callable[[Tensor], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(ROUTERS):
            change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_earlier_experts_are_original_and_new_ones_are_copies_of_expert_0(
    first_round: Path, tmp_path: Path
) -> None:
    spec = hf_to_mcore(first_round, tmp_path / "second", num_new_experts=4)
    assert spec.moe == MoeSpec(4, 2, (0, 1, 2, 3), num_original_experts=3)
    mcore_to_hf(tmp_path / "second", tmp_path / "second-hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (first_round, tmp_path / "second-hf"))
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


def test_a_second_round_is_exported_as_it_is_trained(first_round: Path, tmp_path: Path) -> None:
    hf_to_mcore(first_round, tmp_path / "second", num_new_experts=2, start=Start(noise=0.5))
    mcore_to_hf(tmp_path / "second", tmp_path / "second-hf")
    assert (our_logits(tmp_path / "second") - logits(tmp_path / "second-hf")).abs().max() <= 5e-5
    assert (our_logits(tmp_path / "second") - logits(first_round)).abs().max() > 1e-3  # what was compared can differ


def test_a_third_round_counts_the_experts_of_both_before(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_first_round(make_model("LlamaForCausalLM"), tmp_path)
    for number, (original, new) in enumerate([(3, 2), (5, 1)], start=2):
        spec = hf_to_mcore(folder, tmp_path / f"round{number}", num_new_experts=new)
        assert spec.moe is not None
        assert (spec.moe.num_original_experts, spec.moe.num_experts) == (original, original + new)
        folder = tmp_path / f"round{number}-hf"
        mcore_to_hf(tmp_path / f"round{number}", folder)
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == 6


def test_new_experts_compete_with_expert_0_alone(first_round: Path, tmp_path: Path) -> None:
    """A token whose top-k is without expert 0, or is as good as expert 0 alone, is computed as before the round."""
    direction = torch.linspace(-1, 1, 32)

    def change(router: Tensor) -> None:
        router.mul_(0.01)
        router[0] = direction * 1e6

    edit_routers(first_round, change)
    tensors = load_file(first_round / "model.safetensors")
    for name in tensors:
        if "post_attention_layernorm" in name:
            tensors[name].mul_(0).add_(1)
    save_file(tensors, first_round / "model.safetensors", metadata={"format": "pt"})
    hf_to_mcore(first_round, tmp_path / "second", num_new_experts=2)
    with torch.no_grad():
        chosen = router_choices(first_round)
    # Whether expert 0 leads is a matter of the token's sign; tokens of both kinds are there.
    assert 0 < chosen.float().mean() < 1
    assert (our_logits(tmp_path / "second") - logits(first_round)).abs().max() <= 5e-5


def router_choices(folder: Path) -> Tensor:
    """Whether expert 0 has the highest router logit, [layers, tokens]."""
    model = stock(folder)
    found = []
    for layer in model.model.layers:
        gate = layer.mlp.gate
        gate.register_forward_hook(
            lambda module, inputs, output: found.append(inputs[0].flatten(0, -2) @ module.weight.T)
        )
    model(TOKENS)
    return torch.stack([(scores.argmax(-1) == 0) for scores in found])


def test_layers_without_experts_stay_without(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_first_round(make_model("Qwen3ForCausalLM"), tmp_path, moe_layers=[1, 3])
    spec = hf_to_mcore(folder, tmp_path / "second", num_new_experts=1)
    assert spec.moe == MoeSpec(1, 2, (1, 3), num_original_experts=3)
    mcore_to_hf(tmp_path / "second", tmp_path / "second-hf")
    assert (our_logits(tmp_path / "second") - logits(tmp_path / "second-hf")).abs().max() <= 5e-5
    for layers in ({"moe_layers": [1]}, {"moe_every_k_layers": 2}):
        with pytest.raises(UserError, match="--moe-layers and --moe-every-k-layers"):
            hf_to_mcore(folder, tmp_path / "other", num_new_experts=1, **layers)


def test_k_is_the_mixtures_own_unless_asked(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_first_round(make_model("LlamaForCausalLM"), tmp_path, topk=3)
    assert hf_to_mcore(folder, tmp_path / "own", num_new_experts=1).moe.topk == 3
    assert hf_to_mcore(folder, tmp_path / "asked", num_new_experts=1, topk=2).moe.topk == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm_topk_prob": False},
            "norm_topk_prob must be True .*Qwen2MoeForCausalLM.* False",
        ),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size .*0.* 64"),
        ({"mlp_only_layers": [0], "moe_intermediate_size": 24}, "48 and 24"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step .*1.* 2"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "K = 1"),
    ],
)
def test_mixtures_of_another_kind_are_refused(
    make_model: Callable[..., Path], tmp_path: Path, changes: dict, message: str
) -> None:
    folder = export_first_round(make_model("Qwen2ForCausalLM"), tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(UserError, match=message):
        hf_to_mcore(other, tmp_path / "out", num_new_experts=1)
    with pytest.raises(UserError, match="is an MoE.*--num-new-experts"):
        hf_to_mcore(folder, tmp_path / "out", num_new_experts=None)
