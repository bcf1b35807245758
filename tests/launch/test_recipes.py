"""The paper's recipes: their layout fits the hardware they name, and the trainer accepts them."""

import json
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from moelpr.base import ranks
from moelpr.base.machine import format_bytes
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.model.families.families import read_base
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.__main__ import _parser as planner_flags
from moelpr.plan.__main__ import main as plan
from moelpr.plan.arguments import new_experts
from moelpr.train.arguments.checks import find_problems
from moelpr.train.arguments.checks.folders import checkpoint_bytes
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.requested import RequestedRun
from tests.support.model_shapes import SHAPES, save_config

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PAPER = sorted(path.name for path in RECIPES.glob("paper-*.yaml"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory contains a folder per model, with its config.json; its disk has room for any checkpoint."""
    for name in SHAPES:
        save_config(name, tmp_path / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    monkeypatch.chdir(tmp_path)


def comment_of(recipe: str) -> str:
    lines = (RECIPES / recipe).read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def command_in(comment: str) -> list[str]:
    """The arguments of "python -m moelpr.plan", which may continue on the next line."""
    found = re.search(r"python -m moelpr\.plan (.*?)(?=\n[A-Z])", comment, re.DOTALL)
    assert found
    return shlex.split(found[1])


def value_of(flag: str, argv: list[str]) -> str:
    return argv[argv.index(flag) + 1]


def spec_of(planner_argv: list[str]) -> ModelSpec:
    """The model that a planner command names."""
    args = planner_flags().parse_args(planner_argv)
    family, base = read_base(args.hf_path)
    return with_new_experts(family, base, new_experts(args, base)) if args.num_new_experts else base


def stage_of(recipe: str) -> str:
    return recipe.removesuffix(".yaml").rsplit("-", 1)[1]


@pytest.mark.parametrize("recipe", PAPER)
def test_the_planner_lists_the_layout_with_the_memory_in_the_comment(recipe, models, monkeypatch, capsys) -> None:
    settings, comment = yaml.safe_load((RECIPES / recipe).read_text()), comment_of(recipe)
    monkeypatch.setattr("sys.argv", ["plan", *command_in(comment), "--json"])
    plan()
    planned = json.loads(capsys.readouterr().out)
    expected = {
        "tp": settings.get("tensor-model-parallel-size", 1),
        "pp": settings.get("pipeline-model-parallel-size", 1),
        "ep": settings.get("expert-model-parallel-size", 1),
        "etp": settings.get("expert-tensor-parallel-size", settings.get("tensor-model-parallel-size", 1)),
        "recompute": settings.get("recompute-granularity", "none"),
    }
    assert (
        planned["run"].items()
        >= {
            name.replace("-", "_"): settings[name] for name in ("seq-length", "micro-batch-size", "global-batch-size")
        }.items()
    )
    (layout,) = [one for one in planned["layouts"] if one.items() >= expected.items()]
    assert ("--use-distributed-optimizer" in layout["flags"]) == settings.get("use-distributed-optimizer", False)
    assert f"{layout['fullest_rank']['total_bytes'] / 2**30:.2f} GiB" in comment
    if "the recommended one" in comment:
        assert layout == planned["recommended"]


@pytest.mark.parametrize("recipe", PAPER)
def test_a_checkpoint_has_the_size_in_the_comment(recipe: str, models: None) -> None:
    comment, stage = comment_of(recipe), stage_of(recipe)
    spec = spec_of(command_in(comment))
    args = Namespace(stage=stage, bf16=True, fp16=False, train_everything=False, train_new_embeddings=False)
    args.no_save_optim = None
    args.save_trained_only = yaml.safe_load((RECIPES / recipe).read_text()).get("save-trained-only", False)
    args.use_distributed_optimizer = True
    assert f"A checkpoint takes {format_bytes(checkpoint_bytes(args, spec))}" in comment


@pytest.mark.parametrize("recipe", PAPER)
def test_the_trainer_accepts_it_on_the_hardware_it_names(recipe, models, monkeypatch) -> None:
    planner_argv = command_in(comment_of(recipe))
    spec_of(planner_argv).write(make_material())
    command = shlex.split("--pretrained-checkpoint upcycled --data-path corpus --recipe") + [str(RECIPES / recipe)]
    command += ["--stage", stage_of(recipe)]
    monkeypatch.setattr(ranks, "world_size", lambda: int(value_of("--gpus", planner_argv)))
    run = RequestedRun.gather(command, all_arguments())
    assert [*run.problems, *find_problems(run)] == []


def make_material() -> Path:
    """A checkpoint without model_spec.json in the folder `upcycled`, and `corpus`."""
    folder = Path("upcycled")
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    for suffix in ("bin", "idx"):
        Path(f"corpus.{suffix}").touch()
    with LanguageBitsWriter(Path("corpus.lang")) as bits:
        bits.append_run(True, 1)
        bits.finalize()
    return folder
