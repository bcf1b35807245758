"""moelpr.torchrun: how a run ends that is not stopped as usual, with ranks that only wait."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from moelpr.base.command import STOPPED
from moelpr.base.machine import available_cpus, peak_memory
from tests.support.limits import PROCESS_S
from tests.support.programs import write_program

ROOT = Path(__file__).parents[2]
RANK = r"""
import os, time
from moelpr.base.command import run_command
from moelpr.base import stop

def main():
    stop.end_with_launcher()
    os.write(1, f"{os.environ['RANK']} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n".encode())
    held = bytearray(100 << 20)
    time.sleep(60)

run_command(main)
"""

Start = Callable[..., tuple[subprocess.Popen, list[int], set[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start two ranks; returns the launcher, their process numbers, and their OMP_NUM_THREADS."""
    launchers: list[subprocess.Popen] = []

    def run(*options: str) -> tuple[subprocess.Popen, list[int], set[str]]:
        (tmp_path / "rank.py").write_text(RANK)
        wrapper = write_program(tmp_path / "wrapper", f"{sys.executable} {tmp_path}/rank.py\nexit 1")
        script = wrapper if "--no-python" in options else tmp_path / "rank.py"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        command = [sys.executable, "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", "2", *options]
        environment["PYTHONPATH"] = str(ROOT)
        pipe = subprocess.PIPE
        launcher = subprocess.Popen([*command, script], env=environment, text=True, stdout=pipe, stderr=pipe)
        launchers.append(launcher)
        assert launcher.stdout is not None
        lines = sorted(launcher.stdout.readline().split() for _ in range(2))
        return launcher, [int(line[1]) for line in lines], {line[2] for line in lines}

    yield run
    for launcher in launchers:
        for process in psutil.Process(launcher.pid).children() if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
        launcher.communicate()


@pytest.mark.parametrize("options", [[], ["--no-python"]])
def test_ranks_end_with_a_killed_launcher_and_have_shared_its_cores(start: Start, options: list[str]) -> None:
    """Also behind a script."""
    launcher, ranks, threads = start(*options)
    ends = [os.pidfd_open(rank) for rank in ranks]
    launcher.kill()
    for end in ends:
        assert select.select([end], [], [], 10)[0]
        os.close(end)
    assert threads == {str(max(1, available_cpus() // 2))}


def test_ctrl_c_is_one_message(start: Start) -> None:
    launcher, _, _ = start()
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=30)
    assert (launcher.returncode, errors) == (1, "torchrun: error: interrupted\n")


def test_a_killed_rank_is_named_with_the_memory_it_held(start: Start) -> None:
    launcher, ranks, _ = start()
    while peak_memory(ranks[1]) < 100 << 20:
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=PROCESS_S)
    assert launcher.returncode == 1 and errors.count("\n") == 1
    (held,) = re.findall(r"rank 1 was killed \(signal 9\).*up to (.*) MiB each, 2 ranks of this machine share", errors)
    assert 100 <= float(held) < 1000


@pytest.mark.parametrize(("variables", "code"), [({}, STOPPED), ({"MOELPR_STOPPED_IS_SUCCESS": "1"}, 0)])
def test_a_training_that_was_asked_to_stop_is_no_error_and_not_started_again(tmp_path, variables, code) -> None:
    """Also where Kubeflow lets torchrun start failed ranks again, and where signals of ranks interrupt each other."""
    (tmp_path / "rank.py").write_text(
        "import os\nfrom moelpr.base import stop\nos.write(1, b'started\\n')\n"
        "for _ in range(5000):\n    os.kill(int(os.environ[stop.LAUNCHER_VARIABLE]), stop.STOPPED_SIGNAL)\n"
        "if os.environ['RANK'] == '1':\n    stop.exit_before_the_last_step()\n"
    )
    command = [sys.executable, "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", "2", tmp_path / "rank.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PET_MAX_RESTARTS": "3", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_S)
    assert (done.returncode, done.stdout, done.stderr) == (code, "started\n" * 2, "")


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGINT])
def test_another_signal_is_named(start: Start, number: signal.Signals) -> None:
    """Also one that Python turns into an exception."""
    launcher, ranks, _ = start()
    os.kill(ranks[0], number)
    _, errors = launcher.communicate(timeout=PROCESS_S)
    assert (launcher.returncode, errors) == (1, f"torchrun: error: rank 0 was ended by {number.name}\n")
