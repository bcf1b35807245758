"""Checks of a run's settings: the functions of these modules whose names begin with check_ or note_.

Each yields one message per problem: what was expected, what was given, and the fix. A check yields nothing if the
settings it depends on are missing or invalid themselves, because another check reports those. All checks run, and all
messages are reported at once.
"""

from collections.abc import Iterator

from moelpr.train.arguments.checks import data, flags, folders, hardware, layout, model, resume
from moelpr.train.arguments.requested import RequestedRun

_MODULES = (model, folders, resume, flags, layout, data, hardware)


def find_problems(run: RequestedRun) -> list[str]:
    """A message for each wrong setting."""
    return [*_messages(run, "check_")]


def find_notes(run: RequestedRun) -> list[str]:
    """A message for each setting that is changed or unusual, but not wrong: the run starts."""
    return [*_messages(run, "note_")]


def _messages(run: RequestedRun, prefix: str) -> Iterator[str]:
    for module in _MODULES:
        for name, check in vars(module).items():
            if name.startswith(prefix):
                yield from check(run)
