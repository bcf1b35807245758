"""The workers end with the job."""

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_tools.preprocessing.pool import EncodingPool


class SlowEncoder:
    def encode(self, batch: object) -> None:
        time.sleep(120)


def test_a_job_that_is_stopped_does_not_wait_for_the_document_a_worker_is_at(tmp_path: Path) -> None:
    started = time.monotonic()
    other = multiprocessing.Process(target=time.sleep, args=(100,))  # somebody else's
    other.start()
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyboardInterrupt), EncodingPool(SlowEncoder(), 2, tmp_path) as pool:  # type: ignore[arg-type]
        for _ in range(4):
            pool._submit(SimpleNamespace(is_long_line=False))  # type: ignore[arg-type]
        time.sleep(0.5)
        workers = [child for child in psutil.Process().children() if child.pid not in before]
        assert workers
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60
    assert other.is_alive()
    other.kill()
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
