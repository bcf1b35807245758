"""Checks of a run's settings: the functions in `CHECKS` and `NOTES` of these modules.

Each yields one message per problem: what was expected, what was given, and the fix. A check yields nothing if the
settings it depends on are missing or invalid themselves, because another check reports those. All checks run, and all
messages are reported at once.
"""

from moelpr.train.arguments.checks import data, flags, folders, hardware, layout, model, resume
from moelpr.train.arguments.requested import RequestedRun

_CHECKS = (
    *model.CHECKS,
    *folders.CHECKS,
    *resume.CHECKS,
    *flags.CHECKS,
    *layout.CHECKS,
    *data.CHECKS,
    hardware.check_gpus,
)
_NOTES = (*model.NOTES, *resume.NOTES, layout.note_sequence_parallelism, data.note_tokenizers, *hardware.NOTES)


def find_problems(run: RequestedRun) -> list[str]:
    """A message for each wrong setting."""
    return [message for check in _CHECKS for message in check(run)]


def find_notes(run: RequestedRun) -> list[str]:
    """A message for each setting that is changed or unusual, but not wrong: the run starts."""
    return [message for note in _NOTES for message in note(run)]
