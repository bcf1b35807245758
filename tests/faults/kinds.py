"""The table of all kinds of cases, and how one is tried."""

import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.cases import (
    DAMAGED,
    STARTED,
    Case,
    Outcome,
    a_writer,
    damaged_input,
    disturbed_network,
    full_disk,
    hostile_file,
    killed,
    two_at_once,
    wrong_arguments,
)
from tests.faults.commands import launch, start
from tests.faults.edges import files_beside, gone_results, pages, scripts, uploads
from tests.faults.processes import Failure


@dataclass(frozen=True)
class Kind:
    """A kind of cases."""

    try_case: Callable[[Case], Outcome]
    share: int  # number of its cases in a thousand


KINDS = {
    **{name: Kind(damaged_input, 70) for name in DAMAGED},
    "arguments": Kind(wrong_arguments, 70),
    "hostile files": Kind(hostile_file, 50),
    "kills of forks": Kind(lambda case: killed(case, a_writer(case), start), 40),
    # A case that starts commands as a user does costs a hundred times as much as a damaged file.
    "kills of commands": Kind(lambda case: killed(case, case.random.choice(STARTED), launch), 4),
    "kills of training": Kind(lambda case: killed(case, "train on two ranks", launch), 3),
    "full disks": Kind(full_disk, 20),
    "two at once": Kind(two_at_once, 20),
    "networks": Kind(disturbed_network, 20),
    "scripts": Kind(scripts, 40),
    "uploads": Kind(uploads, 40),
    "files beside": Kind(files_beside, 2),
    "gone results": Kind(gone_results, 50),
    "pages": Kind(pages, 11),
}


def try_case(case: Case) -> tuple[Outcome, str, float]:
    """The outcome of a case, the reason of a failure, and the CPU seconds of all its processes."""
    case.folder.mkdir()
    outcome, why, before = Outcome.FAILED, "", sum(os.times()[:4])
    try:
        outcome = KINDS[case.kind].try_case(case)
    except Failure as failure:
        why = f"{'; '.join(case.notes)}\n    {failure}"
    except Exception:
        why = f"{'; '.join(case.notes)}\n    the campaign itself failed: {traceback.format_exc()}"
    shutil.rmtree(case.folder, ignore_errors=True)
    return outcome, why, sum(os.times()[:4]) - before
