import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelpr.base.errors import UserError
from moelpr.base.run_folder import saved_step
from moelpr.base.stop import SIGNALS
from moelpr.base.yaml_files import dump
from moelpr.train import clean_stop


def settings(save: Path, last_step: int = 10, data_path: Sequence[str] = (), **start: object) -> Any:
    values = {"checkpoint": save, "is_resumed": True, "selected_step": None, "pretrained": None}
    values |= {"saved_step": saved_step(save)} | start
    places = {"save": save, "last_step": last_step, "data_path": data_path}
    return SimpleNamespace(stage=SimpleNamespace(name="stage1"), start=SimpleNamespace(**values), **places)


@pytest.mark.parametrize(
    ("saved", "changes", "finished"),
    [
        ("10", {}, True),
        ("12", {}, True),
        ("9", {}, False),
        ("10", {"last_step": 11}, False),
        ("release", {}, False),
        ("10", {"checkpoint": Path("elsewhere")}, False),
        ("10", {"is_resumed": False}, False),
        ("10", {"selected_step": 5}, False),
        (None, {}, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_saved(tmp_path, saved, changes, finished) -> None:
    if saved is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(saved)
    assert clean_stop.is_finished(settings(tmp_path, **changes)) is finished


def test_a_finished_run_rejects_another_base_and_other_data_unless_its_own_have_moved(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "a.idx").touch()
    base, corpora = tmp_path, ["0.5", f"{tmp_path}/a"]
    (tmp_path / "recipe.yaml").write_text(dump({"pretrained_checkpoint": str(base), "data_path": corpora}))
    for same in ({}, {"pretrained": base, "data_path": corpora}, {"pretrained": base / "x" / ".."}):
        assert clean_stop.is_finished(settings(tmp_path, **same))
    with pytest.raises(UserError, match=f"{tmp_path} .*--pretrained-checkpoint .*{tmp_path}.*--save"):
        clean_stop.is_finished(settings(tmp_path, pretrained=Path("other")))
    with pytest.raises(UserError, match=f"{tmp_path} .*--data-path .*{tmp_path}.*--save"):
        clean_stop.is_finished(settings(tmp_path, data_path=["0.5", "b"]))
    (tmp_path / "a.idx").unlink()
    assert clean_stop.is_finished(settings(tmp_path, data_path=["0.5", "b"]))


def test_the_end_of_a_run_is_printed_and_recorded(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "STOP").touch()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    assert not clean_stop.report_end(settings(tmp_path), 7)
    assert not list(tmp_path.glob("[SF]*"))
    tracker.write_text("10")
    assert clean_stop.report_end(settings(tmp_path), 7)
    assert clean_stop.report_end(settings(tmp_path), 10)
    assert (tmp_path / "FINISHED").read_text() == "10\n"
    stopped, *finished_unscored, finished = capsys.readouterr().out.splitlines()
    assert finished_unscored == [finished, "moelpr: its last step was not validated; moelpr evaluate scores it"]
    assert stopped.startswith(f"moelpr: stopped after step 7 of 10, saved in {tmp_path}")
    assert finished == f"moelpr: stage1 is finished, step 10 of 10 is in {tmp_path}"
    with clean_stop.stops_on_request(settings(tmp_path), None):
        pass
    assert not (tmp_path / "FINISHED").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_end_a_run_without_save_as_they_did_before(number: signal.Signals) -> None:
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        stop = clean_stop.StopRequest()
        stop.listen()
        os.kill(os.getpid(), number)
        assert (stop.received, received) == ({number}, [])
        stop.enter_megatron(None)
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        signal.signal(number, before)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)


RANK_THAT_LOSES_ANOTHER = """
import signal, sys
from moelpr.train.clean_stop import StopRequest

stop = StopRequest()
stop.listen()
for number in sys.argv[2:]:
    signal.raise_signal(int(number))
with stop.leaves_lost_ranks_to_launcher():
    raise RuntimeError(sys.argv[1])
"""
LOST = "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer"


@pytest.mark.parametrize(
    ("message", "signals", "code"),
    [
        (LOST, [signal.SIGTERM], -signal.SIGTERM),
        (LOST, [signal.SIGUSR1, signal.SIGTERM], -signal.SIGTERM),
        (LOST, [signal.SIGUSR1], 1),
        (LOST, [], 1),
        ("a bug", [signal.SIGTERM], 1),
    ],
)
def test_a_rank_that_the_launcher_is_ending_reports_no_lost_rank(message: str, signals: list[int], code: int) -> None:
    words = [sys.executable, "-c", RANK_THAT_LOSES_ANOTHER, message, *(str(int(number)) for number in signals)]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert (ended.returncode, message in ended.stderr) == (code, code == 1)


def test_only_the_exit_after_a_stop_request_is_a_success() -> None:
    run = settings(Path("run"))
    with clean_stop.stops_on_request(run, None):
        sys.exit(0)
    with pytest.raises(UserError, match="could not load"), clean_stop.stops_on_request(run, None):
        sys.exit()  # Megatron, where it can't load a checkpoint
    with pytest.raises(SystemExit), clean_stop.stops_on_request(run, None):
        sys.exit(1)
