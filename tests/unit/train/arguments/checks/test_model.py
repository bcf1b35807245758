from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.model_spec import ModelSpec
from moelpr.train.arguments.checks.model import check_transformer_engine


def test_the_norms_of_olmo_2_need_all_heads_and_torch(make_checkpoint, moe_spec: ModelSpec, problems) -> None:
    args = moe_spec.megatron_args | {"norms_after": True, "qk_layernorm": True}
    olmo = make_checkpoint("olmo", replace(moe_spec, megatron_args=args))
    actual = problems("stage1", olmo, "--tensor-model-parallel-size", "2")
    assert any("--tensor-model-parallel-size 2 would split the heads" in problem for problem in actual)
    engine = MagicMock(transformer_impl="transformer_engine", dataloader_inter_document_masking=False)
    actual = list(check_transformer_engine(MagicMock(args=engine, shape=args)))
    assert any("than OLMo 2's (norms_after); add --transformer-impl local" in problem for problem in actual)


def test_missing_weights_are_reported_before_anything_is_built(upcycled: str, problems) -> None:
    tracker = Path(upcycled) / "latest_checkpointed_iteration.txt"
    tracker.write_text("12\n")
    (actual,) = problems("stage1", upcycled)
    assert str(tracker) in actual and "iter_0000012" in actual and "--ckpt-step" in actual
    tracker.write_text("soon")
    (actual,) = problems("stage1", upcycled)
    assert str(tracker) in actual and "'soon'" in actual
    (actual,) = problems("stage1", upcycled, "--ckpt-step", "3")
    assert upcycled in actual and "iteration 3" in actual


def test_an_untested_flag_is_accepted_on_request_with_a_warning(upcycled, accepted, problems, capsys, tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("no-log-loss-scale-to-tensorboard: true\nallow-untested: [no-log-loss-scale-to-tensorboard]\n")
    argv = ["--recipe", str(recipe), "--empty-unused-memory-level", "1"]
    final = accepted("stage1", upcycled, *argv, "--allow-untested", "empty-unused-memory-level")
    assert final["empty_unused_memory_level"] == 1
    assert final["allow_untested"] == ["no-log-loss-scale-to-tensorboard", "empty-unused-memory-level"]
    warning = "nobody has tested --no-log-loss-scale-to-tensorboard, --empty-unused-memory-level with this trainer"
    assert warning in capsys.readouterr().err
    (actual,) = problems("stage1", upcycled, *argv)
    assert actual.startswith("--empty-unused-memory-level is not tested") and "--allow-untested empty-un" in actual


def test_a_dense_model_has_no_losses_of_the_method(checkpoint, problems) -> None:
    flags = ["--balance-loss-coeff", "--lpr-loss-coeff", "--train-everything", "--save-trained-only"]
    actual = problems("dense", checkpoint("dense"), "--lpr-loss-coeff", "0.1", "--balance-loss-coeff", "0", *flags[2:])
    assert [line.split()[0] for line in actual] == flags
    assert all("--stage stage1" in line for line in actual)


def test_notes_name_what_is_untrained_and_what_earlier_rounds_leave(checkpoint, make_checkpoint, accepted, capsys):
    def noted(stage: str, start: str, *argv: str) -> str:
        accepted(stage, start, *argv)
        return capsys.readouterr().err

    upcycled, grown, later = (checkpoint(name) for name in ("upcycled", "grown", "second-round"))
    assert f"moelpr: warning: --pretrained-checkpoint {upcycled} " in noted("stage2", upcycled)
    assert f"the rows of new tokens in {grown} are untrained" in noted("stage1", grown)
    assert f"{later} has 3 original experts" in noted("stage1", later)
    assert "cannot choose the experts of earlier rounds" in noted("stage1", later, "--stage1-experts", "new")
    twins = Path(make_checkpoint("twins"))  # a base with FFNs that were trained alone
    Lineage("base", {"ffns_of": "out/ffn-hf"}).write(twins / "hf")
    quiet = (
        noted("stage1", upcycled)
        + noted("stage2", str(twins))
        + noted("stage2", make_checkpoint("trained", stage="stage1"))
    )
    quiet += noted("stage1", grown, "--train-new-embeddings") + noted("stage0", grown, "--weight-decay", "0")
    assert "warning: " not in quiet and "untrained" not in quiet and "original experts" not in quiet
