"""Every check of a run's settings: a small function that yields one sentence for each thing that is wrong.

Each sentence says what was found, what was wanted and the remedy. A check stays silent where the settings it looks at
are missing or nonsense themselves: another one says so. All of them run, and all sentences are reported together.
"""

from collections.abc import Callable, Iterable

from moelpr.arguments.checks import checkpoint, data, disk, layout, machine, method, resume, schedule, validation
from moelpr.arguments.checks.run import Run

Check = Callable[[Run], Iterable[str]]

CHECKS: tuple[Check, ...] = (
    *checkpoint.CHECKS,
    *resume.CHECKS,
    *disk.CHECKS,
    *layout.CHECKS,
    *schedule.CHECKS,
    *data.CHECKS,
    *validation.CHECKS,
    *method.CHECKS,
    *machine.CHECKS,
)

# Settings that are changed or unusual but not wrong: said, and the run goes on.
NOTES: tuple[Check, ...] = (
    layout.sequence_parallelism_is_switched_on,
    checkpoint.stage2_without_stage1,
    checkpoint.a_further_round_has_more_original_languages,
    resume.step_of_the_first_start,
    data.tokenizers_that_may_differ,
)


def complaints(run: Run) -> list[str]:
    """Everything that is wrong with `run`, in the order of CHECKS."""
    return [sentence for check in CHECKS for sentence in check(run)]


def notes(run: Run) -> list[str]:
    return [sentence for note in NOTES for sentence in note(run)]
