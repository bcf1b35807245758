import multiprocessing
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from data_tools.preprocessing.workers import worker_pool


def test_stopped_job_does_not_wait_for_its_workers() -> None:
    started = time.monotonic()
    other = multiprocessing.Process(target=time.sleep, args=(100,))  # not the pool's
    other.start()
    before = {child.pid for child in psutil.Process().children()}
    workers: list[psutil.Process] = []

    def batches() -> Iterator[Any]:
        yield from [SimpleNamespace()] * 4
        time.sleep(0.5)
        workers.extend(child for child in psutil.Process().children() if child.pid not in before)
        assert workers
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), worker_pool(lambda _: time.sleep(120), 2) as run:
        next(run(batches()))
    assert time.monotonic() - started < 60
    assert other.is_alive()
    other.kill()
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def test_a_job_ends_whose_workers_are_killed_while_they_send_a_result() -> None:
    ended = []

    def job() -> None:
        with pytest.raises(KeyboardInterrupt), worker_pool(lambda _: bytes(64 << 20), 2) as run:
            next(run(iter([SimpleNamespace()] * 8)))
            raise KeyboardInterrupt  # the other results are on their way
        ended.append(True)

    for count in range(1, 4):
        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        thread.join(30)
        assert len(ended) == count
