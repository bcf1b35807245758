"""The dry run of a stage's command line, as several of its ranks."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelpr.base.errors import UserError
from moelpr.base.files import temporary_folder
from moelpr.base.machine import available_cpus
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.gpus import GPUS

if TYPE_CHECKING:
    from moelpr.train.check.one_rank import DryRun

# Compute capabilities, on which the choice of kernels depends; those of the others are Hopper's.
_CAPABILITIES = {"a100": (8, 0), "a800": (8, 0), "l40s": (8, 9), "rtx4090": (8, 9), "rtx6000ada": (8, 9)}
_CAPABILITIES |= {"a10": (8, 6), "l4": (8, 9), "b200": (10, 0), "rtx5090": (12, 0)}


@dataclass(frozen=True)
class Outcome:
    """The ranks' dry runs, the trainer's notes, and the files that were missing."""

    runs: "list[DryRun]"
    witnesses: "list[DryRun]"  # ranks that were only compared with the others
    notes: list[str]
    missing: list[str]


def prepare(gpu: str, per_node: int) -> None:
    """Import the trainer on fake GPUs, once per process."""
    import logging
    import warnings

    from moelpr.train.check import fake_cuda

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")  # imports warn about optional packages
    fake_cuda.install(GPUS[gpu], _CAPABILITIES.get(gpu.partition("-")[0], (9, 0)), per_node)
    # Megatron takes their kernels if they are installed, and these can't run without values.
    sys.modules.update(dict.fromkeys(("transformer_engine", "apex", "fla")))  # type: ignore[arg-type]
    from moelpr.model.megatron import megatron_fixes

    megatron_fixes.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import moelpr.train.check.one_rank
    import moelpr.train.train  # noqa: F401  # here, so that forks need not


def check(argv: list[str], nodes: int, per_node: int, spec: Callable[[], ModelSpec | None] = lambda: None) -> Outcome:
    """Run the trainer's command line as some ranks of a cluster; UserError if it is refused. Call `prepare` before.

    `spec` returns the model if the checkpoint is not here.
    """
    from moelpr.train.arguments.flags import all_arguments
    from moelpr.train.check.one_rank import DryRun
    from moelpr.train.check.stand_ins import StandIns

    ranks = nodes * per_node
    with temporary_folder("moelpr-check") as folder:
        stand_ins = StandIns.of(argv, folder, spec)
        all_arguments()  # kept for the forks

        def start(rank: int, is_witness: bool = False) -> BaseProcess:
            """Be a rank in a fork of this process, whose patches and memory end with it."""
            arguments = folder, stand_ins.argv, rank, ranks, per_node, is_witness
            process = get_context("fork").Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            return process

        def result(rank: int, process: BaseProcess) -> DryRun:
            process.join()
            file = folder / f"result-{rank}"
            answer = pickle.loads(file.read_bytes()) if file.exists() else None
            if isinstance(answer, UserError):
                raise UserError(stand_ins.as_given(str(answer)))
            if isinstance(answer, SystemExit):  # argparse exits, too
                raise answer
            if not isinstance(answer, DryRun):
                raise RuntimeError(f"rank {rank} fails") from answer
            return answer

        first = result(0, start(0))  # alone, to be refused once
        stages = first.layout.pp
        per_stage = ranks // stages
        # A rank of the first, a middle and the last stage, and witnesses at the other end of the first and the last.
        others = sorted({stages // 2 * per_stage, ranks - 1} if stages > 2 else {ranks - 1} - {per_stage - 1})
        witnesses = sorted({per_stage - 1, ranks - per_stage} - {0, *others})
        started = [*((rank, False) for rank in others), *((rank, True) for rank in witnesses)]
        results = []
        for place in range(0, len(started), width := min(2, available_cpus())):
            forks = {rank: start(rank, is_witness) for rank, is_witness in started[place : place + width]}
            results += [result(*fork) for fork in forks.items()]
        log = (folder / "log-0").read_text(errors="replace")
        notes = [line for line in stand_ins.as_given(log).splitlines() if line.startswith("moelpr: ")]
        runs, compared = [first, *results[: len(others)]], results[len(others) :]
        return Outcome(runs, compared, notes, stand_ins.missing)


def _run_rank(folder: Path, argv: list[str], rank: int, *others: Any) -> None:
    """Print to a file, and write what `dry_run` returns or raises. No thread may have started before the fork."""
    from moelpr.train.check.one_rank import dry_run

    with open(folder / f"log-{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    answer: DryRun | BaseException
    try:
        answer = dry_run(argv, rank, *others)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        answer = error
    (folder / f"result-{rank}").write_bytes(pickle.dumps(answer))
