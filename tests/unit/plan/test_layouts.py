"""Legal layouts, and that the trainer takes their flags."""

import sys
from pathlib import Path

import pytest
import yaml

from moelpr.megatron_patches import cpu, megatron_fixes
from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import RECOMPUTES, Layout, legal_layouts

cpu.install()
megatron_fixes.install()

SHAPE = {
    "num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4,
    "group_query_attention": True, "kv_channels": 8, "max_position_embeddings": 64, "position_embedding_type": "rope",
    "rotary_base": 10000, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True, "add_bias_linear": False,
    "add_qkv_bias": True, "qk_layernorm": False, "untie_embeddings_and_output_weights": False, "vocab_size": 128,
}  # fmt: skip
SPEC = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(4, 2, (0, 1, 2, 3, 4, 5)))


def layouts_of(gpus: int, gpus_per_node: int = 8, batch_unit: int = 8, seq_length: int = 64) -> list[Layout]:
    return list(legal_layouts(SPEC, gpus, gpus_per_node, batch_unit, seq_length))


def test_layouts_of_eight_ranks_are_what_the_rules_leave() -> None:
    found = layouts_of(8)
    assert len(found) == len(set(found))
    assert {layout.recompute for layout in found} == set(RECOMPUTES)
    assert {layout.tp for layout in found} == {1, 2, 4, 8}
    assert {layout.pp for layout in found} == {1, 2}  # 4 and 8 do not divide 6 layers
    assert {layout.ep for layout in found} == {1, 2, 4}
    for layout in found:
        assert layout.world == 8
        assert layout.etp in (1, layout.tp)
        assert layout.expert_dp * layout.ep * layout.etp * layout.pp == 8
    assert {layout.ep for layout in found if layout.etp == 8} == {1}


def test_tensor_parallelism_stays_in_a_node() -> None:
    assert max(layout.tp for layout in layouts_of(16, gpus_per_node=4)) == 4
    assert {layout.tp for layout in layouts_of(12, gpus_per_node=6, batch_unit=12)} == {1, 2}


def test_data_parallel_ranks_share_the_micro_batches_evenly() -> None:
    assert layouts_of(5) == []
    assert {layout.dp for layout in layouts_of(8, batch_unit=2)} == {1, 2}


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_trainer_accepts_the_flags_of_every_kind_of_layout(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All checks a GPU machine makes before a model is built: ours, Megatron's, and those of its model config."""
    import moelpr.arguments.machine
    import moelpr.arguments.parse

    SPEC.write(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").touch()
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(moelpr.arguments.machine.cpu, "is_needed", lambda: False)
    monkeypatch.setattr(moelpr.arguments.parse, "set_global_variables", lambda *args, **kwargs: None)
    words = ["--stage", "stage1", "--pretrained-checkpoint", str(tmp_path), "--lr", "1e-3", "--train-iters", "2"]
    words += ["--micro-batch-size", "1", "--global-batch-size", "8", "--seq-length", "32"]
    words += ["--data-path", str(tmp_path / "corpus")]
    for layout in layouts_of(gpus)[:: 1 if gpus < 8 else 7]:
        args, _ = moelpr.arguments.parse.parse_arguments([*words, *layout.flags()])
        found = (
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size,
            args.expert_tensor_parallel_size, args.data_parallel_size, args.recompute_granularity,
        )  # fmt: skip
        granularity = None if layout.recompute == "none" else layout.recompute
        assert found == (layout.tp, layout.pp, layout.ep, layout.etp, layout.dp, granularity)
        assert args.sequence_parallel == (layout.tp > 1)


def test_the_defaults_are_those_of_the_papers_recipes() -> None:
    from moelpr.plan.__main__ import PAPER_GLOBAL_BATCH_SIZE, PAPER_SEQ_LENGTH

    for stage, seq_length in PAPER_SEQ_LENGTH.items():
        recipe = yaml.safe_load((Path(__file__).parents[3] / f"launch/recipes/paper-{stage}.yaml").read_text())
        assert (recipe["seq-length"], recipe["global-batch-size"]) == (seq_length, PAPER_GLOBAL_BATCH_SIZE)
