"""Commands in the process of a test."""

from moelpr.__main__ import find
from moelpr.base.settings import call
from moelpr.base.tools import COMMANDS


def moelpr(*words: object) -> None:
    """Run a subcommand as `moelpr WORDS` does."""
    name, rest = find([*map(str, words)])
    call(COMMANDS[name].load(), rest)
