"""The sources of a run's settings: recipe, model_spec.json, the record of a run, and where the run starts."""

from argparse import Namespace
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.train.arguments.recipes import read_recipe, recipe_argv
from moelpr.train.train import model_config
from tests.distributed.layout_runs import FACTORS


def test_a_recipe_is_flags_in_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1.0e-3\nbf16: true\nuse_distributed_optimizer: false\nsave: null\ndata-path: [1, a, 2, b]\n")
    assert recipe_argv(read_recipe(recipe)) == ["--lr", "0.001", "--bf16", "--data-path", "1", "a", "2", "b"]


def test_a_recipe_that_comes_with_the_program_is_read_by_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("paper-stage2"))["--global-batch-size"] == 512
    (tmp_path / "paper-stage2.yaml").write_text("lr: 1.0")
    assert read_recipe(Path("paper-stage2.yaml")) == {"--lr": 1.0}
    for missing in ("paper-stage9", "folder/paper-stage1"):
        with pytest.raises(UserError, match=missing):
            read_recipe(Path(missing))


def test_all_keys_of_a_recipe_that_are_not_flags_are_named(upcycled: str, problems, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("micro-batchsize: 4\nxyzzy: false\nrecipe: other.yaml\nglobal-batch-size: many\nbf16: 1\n")
    parts = (
        "did you mean --micro-batch-size?",
        "xyzzy",
        " recipe is not a flag",
        "--global-batch-size must be at least 1, got many",
        " 1;",
    )
    for line, part in zip(problems("stage1", upcycled, "--recipe", str(recipe)), parts, strict=True):
        assert str(recipe) in line and part in line


def test_the_record_of_a_run_is_not_a_recipe(upcycled: str, problems, tmp_path: Path) -> None:
    record = tmp_path / "recipe.yaml"
    record.write_text("model_source: runs/upcycled\nlr: 0.1\nconsumed_train_samples: 5\n")
    (actual,) = problems("stage1", upcycled, "--recipe", str(record))
    assert actual.startswith(str(record)) and "--recipe" in actual


def test_a_recipe_can_name_where_the_run_starts(upcycled: str, accepted, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"save: {upcycled}-run\nload: {upcycled}\nfinetune: true\n")
    assert accepted("stage1", upcycled, "--recipe", str(recipe))["model_source"] == upcycled


def test_a_checkpoint_to_start_from_is_required(tmp_path: Path, problems) -> None:
    (actual,) = problems("stage1", None)
    assert "--pretrained-checkpoint DIR" in actual
    (actual,) = problems("stage1", tmp_path)
    assert f"--pretrained-checkpoint {tmp_path}" in actual and "latest_checkpointed_iteration.txt" in actual


def test_a_damaged_spec_hides_no_other_problem(upcycled: str, problems) -> None:
    (Path(upcycled) / "model_spec.json").write_text("{}")
    first, _ = problems("stage1", upcycled, "--reset-attention-mask")
    assert "model_spec.json" in first


@pytest.mark.parametrize("content", ["- a\n", "a: [1,", ""])
def test_a_damaged_record_of_a_run_is_reported(upcycled: str, problems, content: str) -> None:
    (Path(upcycled) / "recipe.yaml").write_text(content)
    (actual,) = problems("stage1", upcycled)
    assert f"{upcycled}/recipe.yaml" in actual


def test_a_step_is_checked_against_the_settings_it_was_trained_with(make_checkpoint, problems) -> None:
    """A later start was killed before it saved anything. A step without a record has the settings of the last start."""
    run = make_checkpoint("run", stage="stage1")
    (Path(run) / "recipe.yaml").write_text("stage: stage0")
    (actual,) = problems("stage2", None, "--save", run)
    assert actual.startswith(f"{run} is a run of --stage stage1, which --stage stage2 cannot resume; ")
    (Path(run) / "release" / "recipe.yaml").unlink()
    (actual,) = problems("stage2", None, "--save", run)
    assert actual.startswith(f"{run} is a run of --stage stage0")


def test_the_step_selected_for_the_first_start_does_not_reset_a_resumed_run(
    upcycled: str, make_checkpoint, accepted, problems, capsys
) -> None:
    run = Path(make_checkpoint("run", stage="stage1"))
    (run / "release").rename(run / "iter_0000003")
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    start = Path(make_checkpoint("start", stage="stage1"))
    (start / "iter_0000500").mkdir()
    command = ["--ckpt-step", "500", "--save"]
    assert accepted("stage1", start, *command, str(run.with_name("new")))["ckpt_step"] == 500
    assert accepted("stage1", start, *command, str(run))["ckpt_step"] is None
    assert "--ckpt-step 500 selects a step of --pretrained-checkpoint" in capsys.readouterr().err
    (actual,) = problems("stage1", None, *command, str(run))
    assert str(run) in actual and "500" in actual and "--iteration 3" in actual
    (run / "iter_0000003").rename(run / "iter_0000500")
    (run / "iter_0000900").mkdir()
    (run / "latest_checkpointed_iteration.txt").write_text("900")
    further = ("--train-iters", "1000", "--override-opt-param-scheduler")
    assert accepted("stage1", run, *command, str(run), *further)["ckpt_step"] == 500
    assert "has step 900; so does every start of this command: to return once, " in capsys.readouterr().err


def test_a_model_with_other_layers_is_reported(upcycled: str, problems) -> None:
    path = Path(upcycled) / "model_spec.json"
    path.write_text(path.read_text().replace('"RMSNorm"', '"LayerNorm"'))
    actual = problems("stage1", upcycled)
    assert any("normalization" in message and "RMSNorm" in message for message in actual), actual


def test_a_checkpoints_window_multipliers_and_kind_of_rope_reach_the_model(make_checkpoint, accepted) -> None:
    shape = {"window_size": [5, 0], "use_rope_scaling": True, "rope_scaling_factor": 32.0, "qk_layernorm": True}
    start = make_checkpoint("start", shape=shape | FACTORS)
    config = model_config(Namespace(**accepted("stage1", start, "--window-size", "5,0")))
    assert (config.rope_scaling, config.rope_scaling_factor) == (True, 32.0)
    assert config.transformer.window_size == (5, 0) and config.transformer.qk_layernorm
    assert {name: getattr(config.transformer, name) for name in FACTORS} == FACTORS
    assert config.transformer.mup_width_mult == 1.0  # so that Megatron's optimizer has no learning rates of its own
