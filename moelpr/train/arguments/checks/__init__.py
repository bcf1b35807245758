"""Checks of a run's settings: all functions named `check_…` and `note_…` in these modules.

Each yields one message per problem: what was expected, what was given, and the fix. A check yields nothing if the
settings it depends on are missing or invalid themselves, because another check reports those. All checks run, and all
messages are reported at once.
"""

from moelpr.train.arguments.checks import data, flags, folders, hardware, layout, model, resume
from moelpr.train.arguments.requested import RequestedRun


def find_problems(run: RequestedRun) -> list[str]:
    """A message for each wrong setting."""
    return _messages(run, "check_")


def find_notes(run: RequestedRun) -> list[str]:
    """A message for each setting that is changed or unusual, but not wrong: the run starts."""
    return _messages(run, "note_")


def _messages(run: RequestedRun, prefix: str) -> list[str]:
    modules = (model, folders, resume, flags, layout, data, hardware)
    functions = [item for module in modules for item in vars(module).items()]
    return [message for name, check in functions if name.startswith(prefix) for message in check(run)]
