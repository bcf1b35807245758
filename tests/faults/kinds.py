"""The table of all kinds of cases, and how one is tried."""

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
    weight: float  # its share of the time, before it is divided by the sum of all


KINDS = {
    **{name: Kind(damaged_input, 4) for name in DAMAGED},
    "arguments": Kind(wrong_arguments, 4),
    "hostile files": Kind(hostile_file, 6),
    "kills of forks": Kind(lambda case: killed(case, a_writer(case), start), 5),
    "kills of commands": Kind(lambda case: killed(case, case.random.choice(STARTED), launch), 3),
    "kills of training": Kind(lambda case: killed(case, "train on two ranks", launch), 4),
    "full disks": Kind(full_disk, 4),
    "two at once": Kind(two_at_once, 3),
    "networks": Kind(disturbed_network, 3),
    "scripts": Kind(scripts, 3),
    "uploads": Kind(uploads, 3),
    "files beside": Kind(files_beside, 1),
    "gone results": Kind(gone_results, 3),
    "pages": Kind(pages, 0.2),
}


def try_case(case: Case) -> tuple[Outcome, str]:
    """The outcome of a case, and the reason of a failure."""
    case.folder.mkdir()
    try:
        return KINDS[case.kind].try_case(case), ""
    except Failure as failure:
        return Outcome.FAILED, f"{'; '.join(case.notes)}\n    {failure}"
    except Exception:
        return Outcome.FAILED, f"{'; '.join(case.notes)}\n    the campaign itself failed: {traceback.format_exc()}"
    finally:
        shutil.rmtree(case.folder, ignore_errors=True)
