"""mergekit-moe with random gates is another upcycler: everything but its routers equals ours, bit for bit.

make test-mergekit
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import load_stock, make_model  # noqa: F401

MERGEKIT = Path(__file__).parents[2] / ".venv-mergekit/bin/mergekit-moe"
NUM_EXPERTS = 4


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("LlamaForCausalLM", "float32"), ("MistralForCausalLM", "bfloat16")]
)
def test_mergekit_makes_the_same_tensors(
    architecture: str,
    dtype: str,
    make_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    base = make_model(architecture, getattr(torch, dtype), tokenizer=True)
    expert = {"source_model": str(base)}
    recipe = {"base_model": str(base), "gate_mode": "random", "dtype": dtype, "experts": [expert] * NUM_EXPERTS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run([MERGEKIT, tmp_path / "recipe.yaml", tmp_path / "theirs"], check=True, cwd=tmp_path)

    hf_to_mcore(base, tmp_path / "megatron", NewExperts(NUM_EXPERTS - 1))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "ours")
    ours, theirs = (load_stock(tmp_path / name, "MixtralForCausalLM") for name in ("ours", "theirs"))
    a, b = ours.state_dict(), theirs.state_dict()  # mergekit stacks the experts in its files, as transformers does
    assert {name: tensor.dtype for name, tensor in a.items()} == {name: tensor.dtype for name, tensor in b.items()}
    different = {name for name in a if not torch.equal(a[name], b[name])}
    assert different == {f"model.layers.{i}.mlp.gate.weight" for i in range(4)}
    assert {tuple(b[name].shape) for name in different} == {(NUM_EXPERTS, 32)}
    # mergekit drops Mistral's window, which is not its weights.
    for key in ("num_local_experts", "num_experts_per_tok", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
