"""A checkpoint of each kind, a corpus, and a valid command whose problems or final settings are returned."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training import global_vars

from benchmarks import common
from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.model.model_spec import ModelSpec, NewTokens
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.parse import check_arguments, register_arguments
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.arguments.requirements import apply_machine
from moelpr.train.arguments.settings import RunSettings

STEPS = ["--micro-batch-size", "2", "--seq-length", "32", "--lr", "1e-3", "--train-iters", "2"]

Problems = Callable[..., list[str]]


def parsed(argv: list[str]) -> Namespace:
    """Megatron's settings after all checks, as the trainer registers them."""
    run = check_arguments(argv)
    return register_arguments(run, RunSettings.of(run))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, other tests initialize Megatron.
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)
    if calculator := sys.modules.get("megatron.core.num_microbatches_calculator"):
        calculator.unset_num_microbatches_calculator()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the launchers set it


@pytest.fixture
def make_checkpoint(tmp_path: Path, moe_spec: ModelSpec) -> Callable[..., str]:
    """A folder as the converter writes it, without weights; with `record`, as a run with those settings writes it."""

    def make(name: str, spec: ModelSpec = moe_spec, shape: dict | None = None, **record: object) -> str:
        folder = tmp_path / name
        (folder / "release").mkdir(parents=True)
        replace(spec, megatron_args={**spec.megatron_args, **(shape or {})}).write(folder)
        (folder / "latest_checkpointed_iteration.txt").write_text("release")
        if record:
            given = {"lr": 1e-3, "train_iters": 2}  # as in STEPS
            adam = {"optimizer": "adam", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8}
            record = given | adam | {"transformer_impl": "local", "main_grads_dtype": "torch.float32"} | record
            for place in (folder, folder / "release"):
                (place / "recipe.yaml").write_text(yaml.safe_dump(record))
        return str(folder)

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., str], moe_spec: ModelSpec, dense_spec: ModelSpec) -> Callable[[str], str]:
    """A checkpoint of each kind, by its name."""

    def make(name: str) -> str:
        grown = moe_spec.megatron_args | {"vocab_size": 140}
        specs = {
            "dense": dense_spec,
            "few": replace(moe_spec, moe=replace(moe_spec.moe, num_new_experts=1)),
            "one-choice": replace(moe_spec, moe=replace(moe_spec.moe, topk=1)),
            "some-layers": replace(moe_spec, moe=replace(moe_spec.moe, layers=(0, 2))),
            "second-round": replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=3)),
            "grown": replace(moe_spec, megatron_args=grown, new_tokens=NewTokens(120, 20, 128)),
        }
        shapes = {"six": {"num_layers": 6}, "one-group": {"num_query_groups": 1}, "odd": {"vocab_size": 131}}
        return make_checkpoint(name, specs.get(name, moe_spec), shapes.get(name))

    return make


@pytest.fixture
def upcycled(checkpoint: Callable[[str], str]) -> str:
    return checkpoint("upcycled")


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Writes documents of 20 tokens, each original or not; returns their prefix."""

    def write(name: str, *is_original: bool) -> str:
        return str(common.write_corpus(tmp_path / name, 128, ((range(20), bit) for bit in is_original)))

    return write


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    for suffix in ("bin", "idx"):
        (tmp_path / f"corpus.{suffix}").touch()
    with LanguageBitsWriter(tmp_path / "corpus.lang") as bits:
        bits.append(np.ones(1, np.uint8))
        bits.finalize()
    return ["--data-path", str(tmp_path / "corpus")]


@pytest.fixture
def command(data: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A command line that is valid except for `argv`; `steps` and `with_data` can be False."""

    def make(stage: str | None, start: str | Path | None, *argv: str, ranks: int = 1, **given: bool) -> list[str]:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        words = [*(["--stage", stage] if stage else []), *(STEPS if given.get("steps", True) else [])]
        words += data if given.get("with_data", True) else []
        return [*words, *(["--pretrained-checkpoint", str(start)] if start else []), *argv]

    return make


@pytest.fixture
def problems(command: Callable[..., list[str]]) -> Problems:
    """The messages about a `command`."""

    def run(*words: Any, **options: Any) -> list[str]:
        with pytest.raises(UserError) as error:
            parsed(command(*words, **options))
        first, *others = str(error.value).split("\n- ")
        assert not others or re.match(rf"{len(others)} ", first)
        return others or [first]

    return run


@pytest.fixture
def accepted(command: Callable[..., list[str]]) -> Callable[..., dict]:
    """The final settings of a valid `command`, by Megatron's names; unregistered afterwards."""

    def parse(*words: Any, **options: Any) -> dict:
        try:
            return vars(parsed(command(*words, **options)))
        finally:
            destroy_num_microbatches_calculator()
            global_vars.unset_global_variables()

    return parse


@pytest.fixture
def gathered(upcycled: str, data: list[str], monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Settings of a run on CPU, before they are checked."""

    def gather(*argv: str, ranks: int = 1, start: str = upcycled, stage: str = "stage1"):  # noqa: ANN202
        steps = "--seq-length 32 --lr 1e-3 --train-iters 2 --global-batch-size 12 --micro-batch-size 6"
        command = ["--stage", stage, "--pretrained-checkpoint", start, *steps.split(), *data, *argv]
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        run = RequestedRun.gather(command, all_arguments())
        apply_machine(run)
        return run

    return gather
