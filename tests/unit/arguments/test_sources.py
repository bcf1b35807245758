"""Where a run starts."""

from pathlib import Path

import pytest


def test_a_start_is_needed(tmp_path: Path, refused) -> None:
    (said,) = refused("stage1", None)
    assert said.startswith("no checkpoint to start from; name one with --pretrained-checkpoint")
    (said,) = refused("stage1", tmp_path)
    assert "holds no Megatron checkpoint (latest_checkpointed_iteration.txt is missing)" in said


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, upcycled: str, make_checkpoint, accepted) -> None:
    save = str(tmp_path / "run")
    assert accepted("stage1", upcycled, "--save", save)["model_source"] == upcycled
    make_checkpoint("run", stage="stage1")
    assert accepted("stage1", upcycled, "--save", save)["model_source"] == save


def test_a_damaged_spec_hides_no_other_mistake(upcycled: str, refused) -> None:
    (Path(upcycled) / "model_spec.json").write_text("{}")
    said = refused("stage1", upcycled, "--reset-attention-mask")
    assert len(said) == 2
    assert "model_spec.json" in said[0]


@pytest.mark.parametrize("content", ["- a\n", "a: [1,", ""])
def test_a_damaged_record_of_a_run_is_said(upcycled: str, refused, content: str) -> None:
    (Path(upcycled) / "recipe.yaml").write_text(content)
    (said,) = refused("stage1", upcycled)
    assert f"{upcycled}/recipe.yaml" in said


def test_a_step_is_judged_by_what_it_was_trained_with(make_checkpoint, refused) -> None:
    """A later start with other settings was killed before it saved anything."""
    run = make_checkpoint("run", stage="stage1")
    (Path(run) / "recipe.yaml").write_text("stage: stage2")
    (said,) = refused("stage2", None, "--save", run)
    assert said.startswith(f"{run} holds a run of --stage stage1")


def test_what_the_run_was_given_speaks_for_a_step_killed_before_its_own_record(make_checkpoint, refused) -> None:
    run = make_checkpoint("run", stage="stage1")
    (Path(run) / "release" / "recipe.yaml").unlink()
    (said,) = refused("stage2", None, "--save", run)
    assert said.startswith(f"{run} holds a run of --stage stage1")


def test_the_step_named_for_the_first_start_does_not_turn_a_resumed_run_back(
    upcycled: str, make_checkpoint, accepted, refused, capsys
) -> None:
    run = Path(make_checkpoint("run", stage="stage1"))
    (run / "release").rename(run / "iter_0000003")
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    start = Path(make_checkpoint("start", stage="stage1"))
    (start / "iter_0000500").mkdir()
    command = ["--ckpt-step", "500", "--save"]
    assert accepted("stage1", start, *command, str(run.with_name("new")))["ckpt_step"] == 500
    assert accepted("stage1", start, *command, str(run))["ckpt_step"] is None
    assert "--ckpt-step 500 chose the step of --pretrained-checkpoint" in capsys.readouterr().err
    (said,) = refused("stage1", None, *command, str(run))
    assert said == f"{run} has no checkpoint of iteration 500; it holds 3"


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"number_of_hats": 3}, "model_spec.json names number_of_hats, which this Megatron has no argument for"),
        (
            {"rotary_percent": "all"},
            "in the checkpoint's model_spec.json, --rotary-percent: invalid float value: 'all'",
        ),
    ],
)
def test_a_shape_this_megatron_does_not_know_is_said(make_checkpoint, refused, shape: dict, said: str) -> None:
    lines = refused("stage1", make_checkpoint("future", shape=shape), "--reset-attention-mask")
    assert len(lines) == 2
    assert lines[0].startswith(said)


def test_a_checkpoints_window_and_rope_scaling_reach_the_model(make_checkpoint, accepted, refused) -> None:
    from argparse import Namespace

    from moelpr.training.train import model_config

    shape = {"window_size": [5, 0], "use_rope_scaling": True, "rope_scaling_factor": 32.0, "qk_layernorm": True}
    start = make_checkpoint("llama", shape=shape)
    config = model_config(Namespace(**accepted("stage1", start, "--window-size", "5,0")))
    assert (config.rope_scaling, config.rope_scaling_factor) == (True, 32.0)
    assert config.transformer.window_size == (5, 0) and config.transformer.qk_layernorm
    (said,) = refused("stage1", start, "--window-size", "9,0")
    assert said.startswith("--window-size (9, 0) contradicts the checkpoint")
