from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_convert.card.readers import READERS
from checkpoint_convert.compare.reader_requirements import unmet_requirements
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import edit_json, edit_tensors, load_stock, write_export


def found(folder: Path) -> dict[str, str]:
    """Reader → what it lacks, of those that lack something."""
    unmet = {reader: "; ".join(unmet_requirements(folder, reader)) for reader in READERS}
    return {reader: reasons for reader, reasons in unmet.items() if reasons}


@pytest.fixture
def mixtral(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    return write_export(make_model("LlamaForCausalLM", tokenizer=True), tmp_path, NewExperts(2))


def test_qwen2_moe_and_granitemoe_run_in_different_programs(qwen2: Path, tmp_path: Path) -> None:
    export, granite = write_export(qwen2, tmp_path, NewExperts(2)), tmp_path / "granite"
    mcore_to_hf(tmp_path / "megatron", granite, as_class="granitemoe")
    shared = "it requires a shared expert and does not normalize top-k weights"
    assert found(export) == {name: f"{READERS[name]}: {shared}" for name in ("llama.cpp", "mlx")}
    assert found(granite) == {"vllm": "vLLM: it has no biases in this class"}
    zero = "model.layers.0.self_attn.o_proj.bias"
    edit_tensors(granite, lambda tensors: tensors.pop(zero))
    assert unmet_requirements(granite, "llama.cpp") == [f"there is no {zero}"]


def test_layers_without_experts_and_a_missing_tokenizer_are_found(make_model: Callable[..., Path], tmp_path: Path):
    write_export(make_model("Qwen3ForCausalLM", head_dim=8), tmp_path, NewExperts(2, moe_layers=[1]))
    tokenizer = "there is no tokenizer"
    llama_cpp = "llama.cpp (Ollama, LM Studio): it requires experts in every layer"
    assert found(tmp_path / "hf") == {"vllm": tokenizer, "llama.cpp": f"{llama_cpp}; {tokenizer}", "mlx": tokenizer}


def test_every_program_runs_a_mixtral_until_transformers_drops_the_old_names_that_mlx_reads(mixtral: Path) -> None:
    assert found(mixtral) == {}
    load_stock(mixtral).save_pretrained(mixtral)
    assert found(mixtral) == {"mlx": "config.json must have rope_theta: 50000, got None"}


@pytest.mark.parametrize("reader", READERS)
def test_missing_and_misshapen_tensors_are_found(mixtral: Path, reader: str) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(mixtral, lambda tensors: tensors.pop(name))
    (reason,) = unmet_requirements(mixtral, reader)
    assert name in reason
    edit_json(mixtral / "config.json", vocab_size=100)
    (reason,) = unmet_requirements(mixtral, reader)
    assert "model.embed_tokens.weight has shape [99, 32]" in reason
