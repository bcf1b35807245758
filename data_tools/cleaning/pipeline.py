"""The pipelines of `moelpr clean`, and the executors of datatrove that run them.

A task that is complete leaves a mark in the logs, and is not run again. Every task writes files of its own, which
depend on its share of the input only, so a job that was killed goes on to the same bytes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.logging import logger
from tqdm import tqdm

from data_tools.cleaning.blocks import JsonLines, LanguageIdentifier, Parquet, TextReader
from data_tools.cleaning.references import Words
from data_tools.cleaning.tally import KEPT, CleaningReport, Tally
from data_tools.preprocessing.workers import worker_pool
from moelpr.process.errors import UserError
from moelpr.store.files import replace_folder
from moelpr.text.language_id import Detector, FastTextModel
from moelpr.text.sources import open_source
from moelpr.text.streams import open_stream

logger.remove()  # the tasks have logs of their own

WRITERS = {"jsonl": JsonLines, "parquet": Parquet}
REMOVED = "_removed"  # folders with such names are not read as text to train on
MALFORMED, OTHER_LANGUAGE, CONTAMINATED, DUPLICATES = "malformed", "language", "contaminated", "near_duplicates"


@dataclass(frozen=True)
class Cleaning:
    """What is to be done.

    Attributes:
        output: Folder to make.
        work: Folder for what is not finished; "index" in it has the n-grams to remove.
        reader: Reads the input.
        skips_malformed: Whether malformed lines are removed, instead of being an error.
        languages: Canonical codes to keep; if empty, all.
        checks_stated: Whether documents must be in the language that they state.
        ngrams: Words of the n-grams that must not occur; None: whatever occurs.
        near_duplicates: How MinHash finds near duplicates; None: they stay.
        tasks: Number of tasks that share the input.
        form: "jsonl" or "parquet".
        settings: What the result depends on, for the report.
    """

    output: Path
    work: Path
    reader: TextReader
    skips_malformed: bool
    identifier: FastTextModel | Detector | None
    languages: frozenset[str]
    checks_stated: bool
    ngrams: int | None
    near_duplicates: MinhashConfig | None
    tasks: int
    form: str
    settings: dict[str, object] = field(default_factory=dict)

    def stages(self) -> list["Stage"]:
        """The pipelines, each of which needs those before it."""
        work, minhash = self.work, self.near_duplicates
        kept = WRITERS[self.form](work / "result", work / "tallies" / KEPT, self.reader.text_key)
        steps: list[Any] = [self.reader]
        if self.skips_malformed:
            self.reader.removed = self._removed(MALFORMED)
        if self.identifier is not None:
            removed = self._removed(OTHER_LANGUAGE)
            steps.append(LanguageIdentifier(self.identifier, self.languages, self.checks_stated, removed))
        if self.ngrams is not None:
            config = NGramsDecontConfig(n_grams=self.ngrams)
            removed = self._removed(CONTAMINATED)
            steps.append(NGramsDecontFilter(str(work / "index"), config, removed, Words()))
        finish = Stage("report", [Finish(self)], 1)
        if minhash is None:
            return [Stage("filter", [*steps, kept], self.tasks), finish]
        signatures, pairs, remove = (str(work / name) for name in ("signatures", "pairs", "remove"))
        again: PipelineStep = self.reader
        if self.identifier is not None or self.ngrams is not None:
            steps.append(JsonlWriter(str(work / "filtered"), compression="zstd"))
            again = HeldText(work / "filtered")
        last = [again, MinhashDedupFilter(remove, self._removed(DUPLICATES)), kept]
        return [
            Stage("filter", [*steps, MinhashDedupSignature(signatures, minhash, Words())], self.tasks),
            Stage("compare", [MinhashDedupBuckets(signatures, pairs, config=minhash)], minhash.num_buckets),
            Stage("cluster", [MinhashDedupCluster(pairs, remove, minhash)], 1),
            Stage("deduplicate", last, self.tasks),
            finish,
        ]

    def _removed(self, step: str) -> JsonLines:
        return JsonLines(self.work / "result" / REMOVED / step, self.work / "tallies" / step, self.reader.text_key)


class Stage(NamedTuple):
    """A pipeline and the number of its tasks."""

    name: str
    steps: list[Any]
    tasks: int


class HeldText(PipelineStep):
    """Reads what task I of an earlier stage has written: nothing, or FOLDER/I.jsonl.zst."""

    type, name = "reader", "held text"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        if (file := self.folder / f"{rank:05d}.jsonl.zst").exists():
            with open_stream(open_source(str(file))) as (lines, _):
                for line in lines:
                    yield Document(**json.loads(line))


class Finish(PipelineStep):
    """Adds up the report, and gives the result its name."""

    type, name = "writer", "report"

    def __init__(self, cleaning: Cleaning) -> None:
        super().__init__()
        self.output, self.work, self.settings = cleaning.output, cleaning.work, cleaning.settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        steps = [MALFORMED, OTHER_LANGUAGE, CONTAMINATED, DUPLICATES]
        found = {step: Tally.read_all(self.work / "tallies" / step) for step in (KEPT, *steps)}
        removed = {step: found[step] for step in steps if found[step].languages}
        CleaningReport(self.settings, found[KEPT], removed).write(self.work / "result" / REMOVED)
        replace_folder(self.output, self.work / "result")
        for name in ("filtered", "signatures", "pairs", "remove", "index"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        yield from ()


def run_locally(stages: list[Stage], work: Path, workers: int) -> None:
    """Run the tasks in worker processes."""
    for stage in stages:
        logs = str(work / "logs" / stage.name)
        executor = LocalPipelineExecutor(stage.steps, stage.tasks, logging_dir=logs)
        ranks = executor.get_incomplete_ranks()
        # datatrove's own loop waits without end for a worker that was killed.
        with worker_pool(_Task(executor), min(workers, len(ranks) or 1)) as run:
            with tqdm(desc=stage.name, total=stage.tasks, initial=stage.tasks - len(ranks), disable=None) as bar:
                for _ in run(iter(ranks)):
                    bar.update()


@dataclass(frozen=True)
class _Task:
    """Runs a task of a pipeline; what it logs is in its file."""

    executor: PipelineExecutor

    def __call__(self, rank: int) -> None:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            self.executor._run_for_rank(rank, local_rank=1)


def submit_to_slurm(
    stages: list[Stage], work: Path, workers: int, partition: str, time: str, options: dict[str, str]
) -> list[str]:
    """Submit a job array per stage, each of which waits for the one before; returns their numbers."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm needs sbatch, which is not on this machine; run it on a login node")
    before, jobs = None, []
    for stage in stages:
        before = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            time=time,
            partition=partition,
            workers=workers,
            job_name=f"clean-{stage.name}",
            qos="",
            # The jobs call datatrove's commands, which are next to this Python.
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            sbatch_args=options,
            depends=before,
            logging_dir=str(work / "logs" / stage.name),
        )
        try:
            before.launch_job()
        except subprocess.CalledProcessError as error:
            raise UserError(f"sbatch refuses {work}/logs/{stage.name}/launch_script.slurm; see above why") from error
        jobs += [str(before.job_id)] if before.job_id != -1 else []
    return jobs


def run_on_ray(stages: list[Stage], work: Path, workers: int) -> None:
    """Run the tasks on the Ray cluster that this machine is part of."""
    try:
        import ray  # noqa: F401
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise UserError("--executor ray needs Ray; install it next to moelpr: pip install 'ray[default]'") from None
    for stage in stages:
        logs = str(work / "logs" / stage.name)
        RayPipelineExecutor(stage.steps, stage.tasks, workers, logging_dir=logs).run()
