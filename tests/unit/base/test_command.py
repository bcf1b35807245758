"""Exit codes: 0 success, 1 failure, 2 wrong arguments or input; one message, no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from moelpr.base import ranks
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import MachineError, UserError


def code_of(error: BaseException) -> object:
    """The exit code of a command that raises this error."""
    with pytest.raises(SystemExit) as stop:
        run_command(Mock(side_effect=error))
    return stop.value.code


def raised_in_c(error: BaseException) -> SystemError:
    """The error of C code during which a signal's handler has raised `error`."""
    actual = SystemError("returned a result with an exception set")
    actual.__cause__ = error
    return actual


class PanicException(BaseException):
    """As those of pyo3, which are no `Exception`."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PanicException("out of bounds"), 2, "(out of bounds); download the tokenizer again"),
        (UserError("expected a, got b; do c"), 2, "error: expected a, got b; do c"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "the disk is full while writing x.bin"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "x… is too long for the name of a file"),
        (UserError("no file a\nb\x1b[31m\ud800"), 2, r"error: no file a\nb\x1b[31m\ud800"),
        (MachineError("the disk can't be read"), 1, "error: the disk can't be read"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (raised_in_c(KeyboardInterrupt()), 1, "interrupted"),
    ],
)
def test_expected_failures_are_one_line(error, code: int, message: str, capsys) -> None:
    assert code_of(error) == code
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_wrong_command_line_is_reported_in_one_line_like_any_other_error(monkeypatch, capsys) -> None:
    parser = CommandParser(description="a\nb")
    parser.add_argument("--size", type=int, required=True)
    monkeypatch.setattr("sys.argv", ["tools/tool.py", "--size", "x"])
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: parser.parse_args() and None)
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (2, 1)
    assert shown.startswith("tool.py: error: ") and shown.endswith("; see --help\n")
    assert parser.parse_args(["--size", "1", "--debug"]).debug


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hf-pth x", "unrecognized argument --hf-pth; did you mean --hf-path?"),
        ("--hf-pth=x --other 1", "unrecognized argument --hf-pth; did you mean --hf-path?"),
        (
            "--hf-path a --text en=1 tr=2",
            "unrecognized arguments: tr=2; write the flag before each value: --text A=… --text B=…; see --help",
        ),
        ("--nothing-like-it", "unrecognized argument --nothing-like-it; see --help"),
        ("--other --", "argument --other: expected one argument"),
        ("--oth 1", "the following arguments are required: --hf-path"),
    ],
)
def test_an_unrecognized_flag_is_reported_before_a_missing_one(words: str, message: str) -> None:
    parser = CommandParser()
    parser.add_argument("--hf-path", required=True)
    parser.add_argument("--other")
    parser.add_argument("--text", action="append")
    with pytest.raises(UserError) as error:
        parser.parse_args(words.split())
    assert str(error.value).startswith(message)
    assert parser.parse_args(["--other=--x", "--hf-path=--y"]).other == "--x"


def test_bugs_keep_their_traceback_and_other_errors_with_debug(monkeypatch, capsys) -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(Mock(side_effect=ZeroDivisionError()))
    monkeypatch.setattr("sys.argv", ["tool", "--debug"])
    assert code_of(UserError("x")) == 2
    assert "Traceback" in (shown := capsys.readouterr().err) and shown.endswith("error: x\n")


def test_rank_0_reports_first_then_one_rank_of_each_other_node(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)  # by an earlier test of this process
    waited: dict[str, float] = {}
    for rank, local_rank in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        waited[rank] = 0
        monkeypatch.setattr("time.sleep", lambda seconds, rank=rank: waited.update({rank: seconds}))
        code_of(UserError("found a"))
    assert waited["0"] == 0 < waited["2"] < waited["1"] == waited["3"]


def test_another_encoding_than_utf8_is_one_sentence() -> None:
    done = run_in_shell("PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C $PROGRAM", PRINTS.format(1, ""))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "PYTHONUTF8=1" in done.stderr
    assert run_in_shell("LC_ALL=C $PROGRAM", PRINTS.format(1, "")).returncode == 0


def test_a_rank_that_has_lost_another_waits_for_the_launcher_to_say_why(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:45971. GLHF!")
    assert code_of(lost) == 1 and waited[0] >= 5
    shown = capsys.readouterr().err
    assert "another rank has ended" in shown and shown.count("\n") == 1


def test_a_rank_with_a_log_of_its_own_keeps_the_traceback_there(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for has_log in (False, True):
        if has_log:
            (tmp_path / "stderr.log").touch()
        code_of(RuntimeError("gloo/transport/tcp/pair.cc"))
        assert ("Traceback" in capsys.readouterr().err) == has_log


def test_an_interrupted_rank_leaves_the_message_to_the_launcher(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (code_of(KeyboardInterrupt()), capsys.readouterr().err) == (130, "")


def run_in_shell(command: str, code: str) -> subprocess.CompletedProcess:
    """Run Python `code` as `$PROGRAM`, whose output `command` redirects."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "CODE": code}
    command = command.replace("$PROGRAM", f'{sys.executable} -c "$CODE"')
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


PRINTS = """
from moelpr.base.command import run_command
from moelpr.base.errors import UserError

def main():
    print("x" * {})
{}
run_command(main)
"""


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("redirection", ["| head -c 0", "2>&1 | head -c 0"])
def test_a_reader_that_closes_the_pipe_causes_no_traceback(redirection: str, size: int) -> None:
    for end, code in (("", 0), ("    raise UserError('a')\n", 2)):
        done = run_in_shell(f"$PROGRAM {redirection}; exit ${{PIPESTATUS[0]}}", PRINTS.format(size, end))
        assert done.returncode in (code, 1)
        assert done.stderr in ("", "-c: error: a\n")


def test_a_full_disk_behind_stdout_is_one_message() -> None:
    done = run_in_shell("$PROGRAM >/dev/full", PRINTS.format(1, ""))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "disk is full" in done.stderr


def test_ctrl_c_during_imports_shows_no_traceback() -> None:
    # A test run in the background inherits that SIGINT is ignored.
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = run_in_shell("$PROGRAM", f"import moelpr, signal, os\n{heed}\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert done.returncode != 0 and done.stderr == "-c: error: interrupted\n"


def test_a_signal_during_a_finalizer_or_the_end_of_python_ends_the_command_without_traceback() -> None:
    sends = "\nclass Sends:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    start = f"import os, signal, time, weakref\nfrom moelpr.base.command import run_command\n{sends}"
    dropped = run_in_shell("$PROGRAM", f"{start}\nrun_command(lambda: [Sends() and None, time.sleep(60)])\n")
    assert (dropped.returncode, dropped.stderr) == (128 + 15, "")
    at_exit = "weakref.finalize(Sends, os.kill, os.getpid(), signal.SIGTERM)"
    ended = run_in_shell("exec $PROGRAM", f"{start}\nrun_command(lambda: {at_exit})\n")
    assert (ended.returncode, ended.stderr) == (-15, "")


def test_a_progress_bar_that_a_signal_left_half_made_is_not_reported() -> None:
    make = "import moelpr\nfrom tqdm import tqdm\nbar = tqdm.__new__(tqdm)\nbar.disable = False\ndel bar\n"
    assert run_in_shell("$PROGRAM", make).stderr == ""
    assert "ignored" in run_in_shell("$PROGRAM", make.replace("import moelpr\n", "")).stderr
