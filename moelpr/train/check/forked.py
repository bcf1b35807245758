"""Ranks as forks of a process that has imported everything."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

from moelpr.base.errors import UserError


class FailedError(Exception):
    """A fork failed as it should not; the message ends with its traceback."""


class Fork[T]:
    """Calls a function in a fork of this process, whose patches and memory end with it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._log, self._result = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        if (child := os.fork()) == 0:
            _call(function, self._log.fileno(), self._result.fileno())
        self._child = child
        self.printed = ""

    def result(self) -> T:
        """Wait for what the function returns; what it has printed is then in `printed`.

        Raises:
            UserError: The function raised one.
            FailedError: It raised anything else.
        """
        _, status = os.waitpid(self._child, 0)
        with self._log, self._result:
            self._log.seek(0)
            self.printed = self._log.read().decode(errors="replace")
            if status:
                raise FailedError(self.printed[-4000:])
            self._result.seek(0)
            result: T | UserError = pickle.load(self._result)
        if isinstance(result, UserError):
            raise result
        return result


def _call(function: Callable[[], object], log: int, answer: int) -> NoReturn:
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        try:
            result = function()
        except UserError as error:
            result = error
        with os.fdopen(os.dup(answer), "wb") as file:
            pickle.dump(result, file)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without what other code does at exit
