"""Where settings come from, and every contradiction refused with one sentence."""

import sys
from pathlib import Path

import pytest

from moelpr.compat import cpu, megatron_fixes
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec

cpu.install()
megatron_fixes.install()

from moelpr.arguments import parse_arguments, recipe_to_flags  # noqa: E402

STEPS = ["--micro-batch-size", "2", "--seq-length", "32", "--lr", "1e-3", "--train-iters", "2"]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def checkpoint(folder: Path, spec: ModelSpec) -> str:
    folder.mkdir()
    spec.write(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return str(folder)


@pytest.fixture
def upcycled(tmp_path: Path, moe_spec: ModelSpec) -> str:
    return checkpoint(tmp_path / "upcycled", moe_spec)


@pytest.fixture
def dense(tmp_path: Path, dense_spec: ModelSpec) -> str:
    return checkpoint(tmp_path / "dense", dense_spec)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe-router-topk", "1"], r"--moe-router-topk 1 contradicts the checkpoint .* says 2"),
        (["--moe-router-topk=1"], r"--moe-router-topk 1 contradicts the checkpoint .* says 2"),
        (["--moe-aux-loss-coeff=0.5"], r"use --balance-loss-coeff"),
        (["--no-such-flag"], r"unrecognized arguments: --no-such-flag; see"),
        (["--use-distributed-optimizer"], r"Megatron cannot load again with torch's own Adam"),
        (["--reset-attention-mask"], r"--reset-attention-mask has no effect"),
        (["--tensor-model-parallel-size", "2"], r"on a CPU add --expert-tensor-parallel-size 1"),
        (["--global-batch-size", "3"], r"Megatron refuses these arguments"),
        (["--num-layers", "8"], r"--num-layers 8 contradicts the checkpoint"),
        (["--moe-aux-loss-coeff", "0.5"], r"use --balance-loss-coeff"),
        (["--moe-router-load-balancing-type", "sinkhorn"], r"leave it at aux_loss"),
        (["--moe-token-dispatcher-type", "allgather"], r"leave it at alltoall"),
        (["--attention-dropout", "0.1"], r"--attention-dropout needs Transformer Engine"),
        (["--expert-model-parallel-size", "3"], r"4 new experts do not divide over .* 3; use one of 1, 2, 4"),
        (["--recipe", "nowhere.yaml"], r"the recipe nowhere.yaml can't be read"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(upcycled: str, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_arguments(["--stage", "stage1", "--pretrained-checkpoint", upcycled, *STEPS, *words])


def test_a_stage_needs_the_right_kind_of_checkpoint(upcycled: str, dense: str) -> None:
    with pytest.raises(UserError, match="needs an upcycled checkpoint, but .* is dense"):
        parse_arguments(["--stage", "stage2", "--pretrained-checkpoint", dense, *STEPS])
    with pytest.raises(UserError, match="--stage dense was given the MoE checkpoint"):
        parse_arguments(["--stage", "dense", "--pretrained-checkpoint", upcycled, *STEPS])
    with pytest.raises(UserError, match="--lpr-loss-coeff has no meaning for a dense model"):
        parse_arguments(["--stage", "dense", "--pretrained-checkpoint", dense, *STEPS, "--lpr-loss-coeff", "0.1"])


def test_a_start_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to start from; name one with --pretrained-checkpoint"):
        parse_arguments(["--stage", "stage1", *STEPS])
    with pytest.raises(UserError, match="holds no Megatron checkpoint"):
        parse_arguments(["--stage", "stage1", "--pretrained-checkpoint", str(tmp_path), *STEPS])


def test_how_long_to_train_must_be_said(upcycled: str) -> None:
    with pytest.raises(UserError, match="give --train-iters"):
        parse_arguments(["--stage", "stage1", "--pretrained-checkpoint", upcycled, *STEPS[:-2]])


def test_optimizer_state_cannot_cross_from_one_to_several_expert_ranks(
    upcycled: str, moe_spec: ModelSpec, tmp_path: Path
) -> None:
    run = Path(checkpoint(tmp_path / "run", moe_spec))
    (run / "recipe.yaml").write_text("stage: stage1\nexpert_model_parallel_size: 2\n")
    with pytest.raises(UserError, match=r"optimizer state does not fit 1\. .*--no-load-optim"):
        parse_arguments(["--stage", "stage1", "--pretrained-checkpoint", upcycled, "--save", str(run), *STEPS])


def test_a_run_of_another_stage_is_not_resumed(upcycled: str, moe_spec: ModelSpec, tmp_path: Path) -> None:
    run = Path(checkpoint(tmp_path / "run", moe_spec))
    (run / "recipe.yaml").write_text("stage: stage1\n")
    with pytest.raises(UserError, match="holds a run of --stage stage1, which --stage stage2 cannot resume"):
        parse_arguments(["--stage", "stage2", "--pretrained-checkpoint", upcycled, "--save", str(run), *STEPS])


def test_the_converters_folder_is_not_taken_for_a_run(upcycled: str) -> None:
    with pytest.raises(UserError, match="holds a checkpoint but no run to resume"):
        parse_arguments(["--stage", "stage1", "--save", f"{upcycled}/", *STEPS])


def test_a_recipe_is_flags_in_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1.0e-3\nbf16: true\nuse_distributed_optimizer: false\nsave: null\ndata-path: [1, a, 2, b]\n")
    assert recipe_to_flags(recipe) == ["--lr", "0.001", "--bf16", "--data-path", "1", "a", "2", "b"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1,"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        recipe_to_flags(tmp_path / "recipe.yaml")


def test_every_recipe_of_the_project_names_flags_that_exist() -> None:
    from moelpr.arguments import _all_arguments

    known = {flag for action in _all_arguments()._actions for flag in action.option_strings}
    recipes = list((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert {word for word in recipe_to_flags(recipe) if word.startswith("--")} <= known, recipe.name


def test_help_shows_our_flags_before_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.index("--lpr-loss-coeff") < shown.index("--num-layers")
