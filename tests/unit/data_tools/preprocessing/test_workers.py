import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_tools.preprocessing import workers
from data_tools.preprocessing.workers import result_of, worker_pool
from moelpr.base.errors import UserError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def started() -> Callable[[], set[Any]]:
    """The processes that a test has started, and that have not ended."""
    others = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - others


def test_stopped_job_does_not_wait_for_its_workers(started) -> None:
    start = time.monotonic()
    other = multiprocessing.Process(target=time.sleep, args=(100,))  # not the pool's
    other.start()

    def batches() -> Iterator[Any]:
        yield from [SimpleNamespace()] * 4
        time.sleep(0.5)
        assert started() > {other}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), worker_pool(lambda _: time.sleep(120), 2) as run:
        next(run(batches()))
    assert time.monotonic() - start < 60 and started() == {other}
    other.kill()


def ends(job: Callable[[], None]) -> bool:
    """Whether a job ends within half a minute, without an error."""
    done = []
    thread = threading.Thread(target=lambda: done.append(job()), daemon=True)
    thread.start()
    thread.join(30)
    return done == [None]


def test_a_job_ends_whose_workers_are_killed_while_they_send_a_result() -> None:
    def job() -> None:
        with pytest.raises(KeyboardInterrupt), worker_pool(lambda _: bytes(64 << 20), 2) as run:
            next(run(iter([SimpleNamespace()] * 8)))
            raise KeyboardInterrupt  # the other results are on their way

    assert all(ends(job) for _ in range(3))


def test_a_job_ends_whose_workers_can_no_longer_be_asked_to_stop(started) -> None:
    """As those that wait for the lock of a killed one; here they are stopped."""

    def job() -> None:
        with worker_pool(lambda _: 1, 2) as run:
            assert len(list(run(iter([SimpleNamespace()] * 4)))) == 4
            for worker in started():
                os.kill(worker.pid, signal.SIGSTOP)

    has_ended = ends(job)
    for worker in started():
        worker.kill()
    assert has_ended


def test_a_signal_while_workers_are_started_leaves_none(started, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = ProcessPoolExecutor._spawn_process  # type: ignore[attr-defined]

    def interrupted(pool: ProcessPoolExecutor) -> None:
        spawn(pool)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(1000):  # a handler runs between two instructions
            pass

    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit), worker_pool(lambda _: 1, 2):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    deadline = time.monotonic() + 30
    while left := started():
        assert time.monotonic() < deadline, [worker.kill() for worker in left]
        time.sleep(0.05)


def test_a_worker_that_is_ended_before_it_has_begun_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the executor does it if another worker was killed; it would wait for this one indefinitely."""
    spawn = ProcessPoolExecutor._spawn_process  # type: ignore[attr-defined]

    def ended(pool: ProcessPoolExecutor) -> None:
        spawn(pool)
        for worker in pool._processes.values():
            os.kill(worker.pid, signal.SIGTERM)

    monkeypatch.setattr(workers, "_start_worker", partial(later, workers._start_worker))
    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", ended)
    pool = workers.started_pool(1)
    (worker,) = multiprocessing.active_children()
    assert multiprocessing.connection.wait([worker.sentinel], 30), worker.kill()
    pool.shutdown()  # its thread may be the one that is told how the worker ended
    assert worker.exitcode == -signal.SIGTERM


def later(start: Callable[[Any], None], work: Any) -> None:
    time.sleep(1)
    start(work)


def test_a_worker_without_work_ends_with_its_killed_parent() -> None:
    program = (
        "import os, time; from data_tools.preprocessing.workers import started_pool\n"
        "pool = started_pool(1)  # an executor that is collected stops its workers\n"
        "print(pool.submit(os.getpid).result(), flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    end = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert select.select([end], [], [], 10)[0]
    os.close(end)


def test_a_result_that_a_killed_worker_was_sending_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the executor waits for the rest of it as long as any worker lives."""
    killed = []

    def result(timeout: float) -> None:
        raise BrokenProcessPool if killed else TimeoutError

    def worker(number: int) -> SimpleNamespace:
        return SimpleNamespace(is_alive=lambda: number != 1, kill=lambda: killed.append(number))

    pool = SimpleNamespace(_processes={number: worker(number) for number in (1, 2)}, _executor_manager_thread=None)
    with pytest.raises(BrokenProcessPool):
        result_of(pool, SimpleNamespace(result=result, done=lambda: False))
    assert killed == [1, 2]


def test_a_worker_that_is_killed_before_the_queue_is_full_is_one_sentence() -> None:
    def batches() -> Iterator[Any]:
        yield SimpleNamespace()
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        for _ in range(100):
            time.sleep(0.1)
            yield SimpleNamespace()

    with pytest.raises(UserError, match="a worker process was killed"), worker_pool(lambda _: None, 1) as run:
        list(run(batches()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_ends_whose_results_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a module of the executor's thread was replaced by a user's file of its name."""
    monkeypatch.setattr(workers, "_CHECK_EVERY_S", 0.05)
    monkeypatch.setattr("concurrent.futures.process._ExecutorManagerThread.wait_result_broken_or_wakeup", None)
    with pytest.raises(UserError, match="--workers"), worker_pool(str, 1) as run:
        list(run(iter([1])))
