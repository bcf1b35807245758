"""Ranks as forks of a process that has imported everything, one after another."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from moelpr.process.errors import UserError


class Answer[T](NamedTuple):
    """What a fork returned, and what it printed."""

    result: T
    printed: str


class FailedError(Exception):
    """A fork failed as it should not; the message ends with its traceback."""


def in_a_fork[T](function: Callable[[], T]) -> Answer[T]:
    """Call a function in a fork, whose patches and memory end with it.

    Raises:
        UserError: The function raised one.
        FailedError: It raised anything else.
    """
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as answer:
        if (child := os.fork()) == 0:
            _be_the_fork(function, log.fileno(), answer.fileno())
        _, status = os.waitpid(child, 0)
        log.seek(0)
        printed = log.read().decode(errors="replace")
        answer.seek(0)
        if status or not (content := answer.read()):
            raise FailedError(printed[-4000:])
        result = pickle.loads(content)
        if isinstance(result, UserError):
            raise result
        return Answer(result, printed)


def _be_the_fork(function: Callable[[], object], log: int, answer: int) -> NoReturn:
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        try:
            result = function()
        except UserError as error:
            result = error
        os.write(answer, b"")
        with os.fdopen(os.dup(answer), "wb") as file:
            pickle.dump(result, file)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without what other code does at exit
