"""Megatron's exits because of NaN or Inf become exit code 1 with one message; other exits stay as they are."""

import argparse

import pytest
from megatron.core import rerun_state_machine

from moelpr.training.nonfinite import report_nonfinite_exit

ARGS = argparse.Namespace(curr_iteration=6, debug=False)


class Log:
    def __init__(self) -> None:
        self.warnings: list[tuple[int, str]] = []

    def warn(self, step: int, warnings: list) -> None:
        self.warnings += [(step, warning.kind) for warning in warnings]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return Log()


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION),
        SystemExit(rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE),
        RuntimeError("Unexpected result nan on rank 0 at iteration #7"),
    ],
)
def test_a_nonfinite_step_is_logged_and_exits_with_code_1(log: Log, error: BaseException) -> None:
    with pytest.raises(SystemExit) as exit_, report_nonfinite_exit(ARGS, log):  # type: ignore[arg-type]
        raise error
    assert exit_.value.code == 1
    assert log.warnings == [(7, "not_a_number")]


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(3), RuntimeError("out of memory")])
def test_other_exits_stay_as_they_are(log: Log, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, report_nonfinite_exit(ARGS, log):  # type: ignore[arg-type]
        raise error
    assert raised.value is error
    assert log.warnings == []
