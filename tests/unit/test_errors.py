"""Exit codes: 0 done, 1 failed, 2 wrong arguments or input; one sentence, no traceback."""

import errno

import pytest

from moelpr.errors import UserError, run_command


def fail_with(error: BaseException):  # noqa: ANN201
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("found a, wanted b; do c"), 2, "error: found a, wanted b; do c"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "the disk is full while writing x.bin"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_expected_failures_are_one_sentence(error, code: int, said: str, capsys) -> None:  # noqa: ANN001
    with pytest.raises(SystemExit) as stop:
        run_command(fail_with(error))
    assert stop.value.code == code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_our_own_slips_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))


def test_debug_shows_the_traceback_of_a_user_error(monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("sys.argv", ["tool", "--debug"])
    with pytest.raises(UserError):
        run_command(fail_with(UserError("x")))


def test_rank_0_speaks_first_then_one_rank_of_each_other_node(monkeypatch, capsys) -> None:  # noqa: ANN001
    waited: dict[str, float] = {}
    for rank, local_rank in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        waited[rank] = 0
        monkeypatch.setattr("time.sleep", lambda seconds, rank=rank: waited.update({rank: seconds}))
        with pytest.raises(SystemExit):
            run_command(fail_with(UserError("found a")))
    assert waited["0"] == 0 < waited["2"] < waited["1"] == waited["3"]
