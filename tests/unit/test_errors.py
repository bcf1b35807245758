"""Exit codes: 0 success, 1 failure, 2 wrong arguments or input; one message, no traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.errors import CommandParser, MachineError, UserError, run_command


def fail_with(error: BaseException):  # noqa: ANN201
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("expected a, got b; do c"), 2, "error: expected a, got b; do c"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "the disk is full while writing x.bin"),
        (MachineError("the disk can't be read"), 1, "error: the disk can't be read"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_expected_failures_are_one_line(error, code: int, message: str, capsys) -> None:  # noqa: ANN001
    with pytest.raises(SystemExit) as stop:
        run_command(fail_with(error))
    assert stop.value.code == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("words", ["--size 1", "child --size x"])
def test_a_wrong_command_line_is_reported_in_one_line_like_any_other_error(words: str, monkeypatch, capsys) -> None:  # noqa: ANN001
    parser = CommandParser(description="a\nb")
    parser.add_subparsers(required=True).add_parser("child").add_argument("--size", type=int, required=True)
    monkeypatch.setattr("sys.argv", ["tools/tool.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: parser.parse_args() and None)
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (2, 1)
    assert shown.startswith("tool.py: error: ") and shown.endswith("; see --help\n")
    assert parser.parse_args(["child", "--size", "1", "--debug"]).debug


def test_help_marks_required_flags_and_keeps_the_lines_of_the_description() -> None:
    parser = CommandParser(description="a\nb")
    parser.add_argument("--size", required=True, help="number")
    parser.add_argument("--other", help="number")
    for shown in (parser.format_help(), parser.format_help()):
        assert "a\nb\n" in shown and shown.count("number (required)\n") == 1 == shown.count("(required)")


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))


def test_debug_shows_the_traceback_of_a_user_error(monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("sys.argv", ["tool", "--debug"])
    with pytest.raises(UserError):
        run_command(fail_with(UserError("x")))


def test_rank_0_reports_first_then_one_rank_of_each_other_node(monkeypatch, capsys) -> None:  # noqa: ANN001
    waited: dict[str, float] = {}
    for rank, local_rank in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        waited[rank] = 0
        monkeypatch.setattr("time.sleep", lambda seconds, rank=rank: waited.update({rank: seconds}))
        with pytest.raises(SystemExit):
            run_command(fail_with(UserError("found a")))
    assert waited["0"] == 0 < waited["2"] < waited["1"] == waited["3"]


def test_a_waiting_rank_ends_without_a_message_when_the_first_has_failed() -> None:
    """The launcher's SIGTERM ends it although the trainer has a handler that only sets a flag."""
    code = """if True:
        import signal, time
        from moelpr.errors import UserError, run_command
        signal.signal(signal.SIGTERM, lambda *_: None)
        sleep = time.sleep
        time.sleep = lambda seconds: (print("waits", flush=True), sleep(seconds))
        def main():
            raise UserError("found a")
        run_command(main)
    """
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    rank = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "waits\n"
    rank.terminate()
    _, errors = rank.communicate(timeout=5)
    assert (rank.returncode, errors) == (-signal.SIGTERM, "")


def test_names_that_are_not_ascii_are_read_and_written_without_utf8_mode(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys\nfrom moelpr.errors import run_command\n"
        "run_command(lambda: open(sys.argv[1], 'w').write(sys.argv[1]) and None)\n"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, script, "\u00e9\u65e5"], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "\u00e9\u65e5").read_text(encoding="utf-8") == "\u00e9\u65e5"
