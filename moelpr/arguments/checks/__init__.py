"""Checks of a run's settings: all functions named `check_…` and `note_…` in these modules.

Each yields one message per problem: what was expected, what was given, and the fix. A check yields nothing if the
settings it depends on are missing or invalid themselves, because another check reports those. All checks run, and all
messages are reported at once.
"""

from collections.abc import Callable, Iterable

from moelpr.arguments.checks import data, layout, model, resume
from moelpr.arguments.settings import RunSettings

_Check = Callable[[RunSettings], Iterable[str]]


def _functions(prefix: str) -> list[_Check]:
    modules = (model, resume, layout, data)
    return [value for module in modules for name, value in vars(module).items() if name.startswith(prefix)]


CHECKS = _functions("check_")
# Settings that are changed or unusual, but not wrong: they are logged, and the run starts.
NOTES = _functions("note_")


def find_problems(run: RunSettings) -> list[str]:
    """A message for each wrong setting."""
    return [message for check in CHECKS for message in check(run)]


def find_notes(run: RunSettings) -> list[str]:
    """A message for each setting that is worth knowing about."""
    return [message for note in NOTES for message in note(run)]
