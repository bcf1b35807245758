"""When a run counts as finished, and how it is stopped."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.process.errors import UserError
from moelpr.process.stop import SIGNALS
from moelpr.store.yaml_files import dump
from moelpr.training import clean_stop


def settings(save: Path, **changes: object) -> argparse.Namespace:
    values = {
        "stage": "stage1", "save": str(save), "model_source": f"{save}/", "is_resumed": True, "ckpt_step": None,
        "train_iters": 10, "train_samples": None, "global_batch_size": 4,
        "pretrained_checkpoint": None, "data_path": None,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("saved", "changes", "finished"),
    [
        ("10", {}, True),
        ("12", {}, True),
        ("9", {}, False),
        ("10", {"train_iters": 11}, False),
        ("10", {"train_iters": None, "train_samples": 43}, True),
        ("10", {"train_iters": None, "train_samples": 44}, False),
        ("release", {}, False),
        ("10", {"model_source": "elsewhere"}, False),
        ("10", {"is_resumed": False}, False),
        ("10", {"ckpt_step": 5}, False),
        (None, {}, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_saved(
    tmp_path: Path, saved: str | None, changes: dict, finished: bool
) -> None:
    if saved is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(saved)
    assert clean_stop.is_finished(settings(tmp_path, **changes)) is finished


def test_a_finished_run_rejects_another_base_and_other_data_unless_its_own_have_moved(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "a.idx").touch()
    own = {"pretrained_checkpoint": str(tmp_path), "data_path": ["0.5", f"{tmp_path}/a"]}
    (tmp_path / "recipe.yaml").write_text(dump(own))
    for same in ({}, own, {"pretrained_checkpoint": f"{tmp_path}/x/.."}):
        assert clean_stop.is_finished(settings(tmp_path, **same))
    for name, other in (("pretrained_checkpoint", "other"), ("data_path", ["0.5", "b"])):
        with pytest.raises(UserError, match=f"{tmp_path} .*--{name.replace('_', '-')} .*{tmp_path}.*--save"):
            clean_stop.is_finished(settings(tmp_path, **{name: other}))
    (tmp_path / "a.idx").unlink()
    assert clean_stop.is_finished(settings(tmp_path, data_path=["0.5", "b"]))


def test_the_end_of_a_run_is_printed_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "STOP").touch()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    clean_stop.report_end(settings(tmp_path), 7)
    assert not list(tmp_path.glob("[SF]*"))
    tracker.write_text("10")
    clean_stop.report_end(settings(tmp_path), 7)
    clean_stop.report_end(settings(tmp_path), 10)
    assert (tmp_path / "FINISHED").read_text() == "10\n"
    stopped, *finished_unscored, finished = capsys.readouterr().out.splitlines()
    assert finished_unscored == [
        finished,
        "moelpr: its last step was not validated; python -m moelpr.evaluate scores it",
    ]
    assert stopped.startswith(f"moelpr: stopped after step 7 of 10, saved in {tmp_path}")
    assert finished == f"moelpr: stage1 is finished, step 10 of 10 is in {tmp_path}"
    clean_stop.begin(settings(tmp_path, train_iters=20))
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
        stop.enter_megatron(argparse.Namespace(save=None))
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        signal.signal(number, before)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)


RANK_THAT_LOSES_ANOTHER = """
import signal, sys
from moelpr.training.clean_stop import StopRequest

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
    with clean_stop.ends_the_run():
        sys.exit(0)
    with pytest.raises(UserError, match="could not load"), clean_stop.ends_the_run():
        sys.exit()  # Megatron, where it can't load a checkpoint
    with pytest.raises(SystemExit), clean_stop.ends_the_run():
        sys.exit(1)
