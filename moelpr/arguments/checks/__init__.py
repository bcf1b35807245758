"""Checks of a run's settings: functions that yield one message per problem.

A message names what was expected, what was given and the fix. A check yields nothing if the settings it depends on are
missing or invalid themselves, because another check reports those. All checks run, and all messages are reported at
once.
"""

from collections.abc import Callable, Iterable

from moelpr.arguments.checks import data, layout, model, resume
from moelpr.arguments.settings import RunSettings

_MODULES = (model, resume, layout, data)
CHECKS: list[Callable[[RunSettings], Iterable[str]]] = [check for module in _MODULES for check in module.CHECKS]

# Settings that are changed or unusual, but not wrong: they are logged, and the run starts.
NOTES: list[Callable[[RunSettings], Iterable[str]]] = [note for module in _MODULES for note in module.NOTES]


def find_problems(run: RunSettings) -> list[str]:
    """A message for each wrong setting, in the order of CHECKS."""
    return [message for check in CHECKS for message in check(run)]


def find_notes(run: RunSettings) -> list[str]:
    """A message for each setting that is worth knowing about."""
    return [message for note in NOTES for message in note(run)]
