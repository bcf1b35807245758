"""The pipelines of `moelpr data clean`, and the executors of datatrove that run them.

A task that is complete leaves a mark in the logs, and is not run again. Every task writes files of its own, which
depend on its share of the input only, so a job that was killed goes on to the same bytes.
"""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
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
from moelpr.store.files import replace_folder, write_text
from moelpr.text.language_id import Detector, FastTextModel
from moelpr.text.sources import open_source
from moelpr.text.streams import open_stream
from moelpr.workflow.slurm import queued_jobs

logger.remove()  # the tasks have logs of their own

WRITERS = {"jsonl": JsonLines, "parquet": Parquet}
_JOBS, _JOB_NAME = "slurm-jobs.txt", "clean-"
REMOVED = "_removed"  # folders with such names are not read as text to train on
MALFORMED, OTHER_LANGUAGE, CONTAMINATED, DUPLICATES = "malformed", "language", "contaminated", "near_duplicates"


class Stage(NamedTuple):
    """A pipeline and the number of its tasks."""

    name: str
    steps: list[Any]
    tasks: int


def stages_of(
    arguments: Namespace,
    reader: TextReader,
    identifier: FastTextModel | Detector | None,
    languages: frozenset[str],
    work: Path,
    finish: "Finish",
) -> list[Stage]:
    """Return the pipelines of a command line, each of which needs those before it.

    Args:
        languages: Canonical codes to keep; if empty, all.
        work: Folder for what is not finished; "index" in it has the n-grams to remove.
    """

    def writes(step: str) -> JsonLines:
        return JsonLines(work / "result" / REMOVED / step, work / "tallies" / step, reader.text_key)

    tasks, steps = arguments.tasks, [reader]
    if arguments.on_error == "skip":
        reader.removed = writes(MALFORMED)
    if identifier is not None:
        is_stated = bool(arguments.language or arguments.language_key)
        steps.append(LanguageIdentifier(identifier, languages, is_stated, writes(OTHER_LANGUAGE)))
    if arguments.decontaminate:
        config = NGramsDecontConfig(n_grams=arguments.ngram_words)
        steps.append(NGramsDecontFilter(str(work / "index"), config, writes(CONTAMINATED), Words()))
    kept = WRITERS[arguments.format](work / "result", work / "tallies" / KEPT, reader.text_key)
    if not arguments.near_duplicates:
        return [Stage("filter", [*steps, kept], tasks), Stage("report", [finish], 1)]
    minhash = MinhashConfig(num_buckets=arguments.minhash_buckets, hashes_per_bucket=arguments.minhash_hashes)
    signatures, pairs, remove = (str(work / name) for name in ("signatures", "pairs", "remove"))
    again: PipelineStep = reader
    if len(steps) > 1:
        steps.append(JsonlWriter(str(work / "filtered"), compression="zstd"))
        again = HeldText(work / "filtered")
    return [
        Stage("filter", [*steps, MinhashDedupSignature(signatures, minhash, Words())], tasks),
        Stage("compare", [MinhashDedupBuckets(signatures, pairs, config=minhash)], minhash.num_buckets),
        Stage("cluster", [MinhashDedupCluster(pairs, remove, minhash)], 1),
        Stage("deduplicate", [again, MinhashDedupFilter(remove, writes(DUPLICATES)), kept], tasks),
        Stage("report", [finish], 1),
    ]


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

    def __init__(self, output: Path, work: Path, settings: dict[str, object]) -> None:
        super().__init__()
        self.output, self.work, self.settings = output, work, settings

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
            job_name=f"{_JOB_NAME}{stage.name}",
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
        write_text(work / _JOBS, "\n".join(jobs))
    return jobs


def refuse_running(work: Path) -> None:
    """Raise an error if jobs that an earlier command has submitted are pending or running."""
    if not (work / _JOBS).exists() or shutil.which("squeue") is None:
        return
    queued = queued_jobs()
    if active := [job for job in (work / _JOBS).read_text().split() if queued.get(job, "").startswith(_JOB_NAME)]:
        raise UserError(
            f"jobs {', '.join(active)} of {work} are pending or running on Slurm; wait for them, or cancel them "
            f"(scancel {' '.join(active)})"
        )


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
