"""The paper's recipes: their layout fits the hardware they name, and the trainer accepts them."""

import json
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from moelpr.base import ranks
from moelpr.base.machine import format_bytes
from moelpr.base.settings import parse
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.model.families.families import read_base
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.commands import Settings
from moelpr.train.arguments.checks import find_problems
from moelpr.train.arguments.checks.folders import checkpoint_bytes
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.requested import RequestedRun
from tests.support.commands import moelpr
from tests.support.model_shapes import SHAPES, save_config

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory contains a folder per model, with its config.json; its disk has room for any checkpoint."""
    for name in SHAPES:
        save_config(name, tmp_path / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    monkeypatch.chdir(tmp_path)


class Recipe(NamedTuple):
    path: Path
    stage: str
    settings: dict[str, Any]
    comment: str
    planner_words: list[str]  # the arguments of "moelpr layouts" in the comment

    def spec(self) -> ModelSpec:
        """The model that the planner's command names."""
        args = parse(Settings, self.planner_words)
        family, base = read_base(args.hf_path)
        number = int(args.num_new_experts or 0)
        return with_new_experts(family, base, args.experts(number, base)) if number else base


@pytest.fixture(params=sorted(RECIPES.glob("paper-*.yaml")), ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest, models: None) -> Recipe:
    text = request.param.read_text()
    comment = "\n".join(re.findall(r"^#+ *(.*)", text, re.MULTILINE))
    (words,) = re.findall(r"moelpr layouts (.*?)(?=\n[A-Z])", comment, re.DOTALL)
    stage = request.param.stem.rpartition("-")[2]
    return Recipe(request.param, stage, yaml.safe_load(text), comment, shlex.split(words))


def test_the_planner_lists_the_layout_with_the_memory_in_the_comment(recipe: Recipe, capsys) -> None:
    moelpr("layouts", *recipe.planner_words, "--json")
    planned, get = json.loads(capsys.readouterr().out), recipe.settings.get
    expected = {
        "tp": get("tensor-model-parallel-size", 1),
        "pp": get("pipeline-model-parallel-size", 1),
        "ep": get("expert-model-parallel-size", 1),
        "etp": get("expert-tensor-parallel-size", get("tensor-model-parallel-size", 1)),
        "recompute": get("recompute-granularity", "none"),
    }
    for name in ("seq-length", "micro-batch-size", "global-batch-size"):
        assert planned["run"][name.replace("-", "_")] == recipe.settings[name]
    (layout,) = [row for row in planned["layouts"] if row.items() >= expected.items()]
    assert ("--use-distributed-optimizer" in layout["flags"]) == get("use-distributed-optimizer", False)
    assert f"{layout['fullest_rank']['total_bytes'] / 2**30:.2f} GiB" in recipe.comment
    if "the recommended one" in recipe.comment:
        assert layout == planned["recommended"]


def test_a_checkpoint_has_the_size_in_the_comment(recipe: Recipe) -> None:
    args = Namespace(stage=recipe.stage, bf16=True, fp16=False, train_everything=False, train_new_embeddings=False)
    args.no_save_optim = None
    args.save_trained_only = recipe.settings.get("save-trained-only", False)
    args.use_distributed_optimizer = True
    assert f"A checkpoint takes {format_bytes(checkpoint_bytes(args, recipe.spec()))}" in recipe.comment


def test_the_trainer_accepts_it_on_the_hardware_it_names(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "upcycled"
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    recipe.spec().write(folder)
    for suffix in ("bin", "idx"):
        Path(f"corpus.{suffix}").touch()
    with LanguageBitsWriter(Path("corpus.lang")) as bits:
        bits.append(np.ones(1, np.uint8))
        bits.finalize()
    command = f"--stage {recipe.stage} --pretrained-checkpoint upcycled --data-path corpus --recipe".split()
    gpus = int(recipe.planner_words[recipe.planner_words.index("--gpus") + 1])
    monkeypatch.setattr(ranks, "world_size", lambda: gpus)
    run = RequestedRun.gather([*command, str(recipe.path)], all_arguments())
    assert [*run.problems, *find_problems(run)] == []
