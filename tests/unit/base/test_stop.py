"""Helper processes and ranks end with the process that started them, and a rank's signals reach no helper."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.base import stop
from moelpr.base.command import STOPPED

TRAINER_WITH_A_HELPER = """
import multiprocessing, os, signal, sys, time
from moelpr.base import stop

def help(ready):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    ready.put(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    stop.watch_over_helpers()
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.SimpleQueue()
    context.Process(target=help, args=(ready,), daemon=True).start()
    print(ready.get(), flush=True)
    sys.exit(input())
else:
    stop.become_helper()
"""


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("end", ["killed", "an error"])
def test_a_helper_outlives_signals_but_not_its_trainer(tmp_path: Path, how: str, end: str) -> None:
    """For each start method of multiprocessing, and each way in which the trainer may end."""
    (tmp_path / "trainer.py").write_text(TRAINER_WITH_A_HELPER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, tmp_path / "trainer.py", how]
    trainer = subprocess.Popen(command, env=environment, text=True, **streams)  # type: ignore[call-overload]
    assert trainer.stdout is not None
    helper = int(trainer.stdout.readline())
    helper_ended = os.pidfd_open(helper)
    try:
        assert select.select([helper_ended], [], [], 0.2)[0] == []
        if end == "killed":
            trainer.kill()
        trainer.communicate("an error\n", timeout=10)
        assert select.select([helper_ended], [], [], 5)[0] == [helper_ended]
    finally:
        trainer.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)
        os.close(helper_ended)


def test_a_stopped_rank_without_a_launcher_exits_with_the_code_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stop.LAUNCHER_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as end:
        stop.exit_before_the_last_step()
    assert end.value.code == STOPPED


LAUNCHER = """
import os, subprocess, sys, time

rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(60)
"""
RANK = """
import time
from moelpr.base import stop

stop.end_with_launcher()
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_under_torchrun", [True, False])
def test_a_rank_ends_with_torchrun_but_not_with_a_shell(is_under_torchrun: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment |= {"TORCHELASTIC_RUN_ID": "x"} if is_under_torchrun else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    rank_ended = os.pidfd_open(rank)
    try:
        launcher.kill()
        launcher.wait()
        ended = select.select([rank_ended], [], [], 5 if is_under_torchrun else 0.5)[0]
        assert bool(ended) == is_under_torchrun
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
        os.close(rank_ended)
