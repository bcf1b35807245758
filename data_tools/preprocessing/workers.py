"""Worker processes that each turn batches of lines into a result, in order."""

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

from moelpr.base.command import deferred_signals
from moelpr.base.errors import UserError, reports_panics
from moelpr.base.stop import kill_with_parent
from moelpr.data.text.remote import close_connections

_CHECK_EVERY_S = 5.0

# Set in each worker, which inherits the function with its loaded tokenizer when it is forked.
_work: Callable[[Any], Any]


@contextmanager
def worker_pool[B, T](work: Callable[[B], T], workers: int) -> Iterator[Callable[[Iterator[B]], Iterator[tuple[B, T]]]]:
    """Start worker processes that call `work` with batches, and stop them in the end.

    Yields:
        A function that yields batches with the results of `work`, in order, whatever the number of workers, and raises
        `UserError` if a worker did or was killed.
    """
    others = set(multiprocessing.active_children())

    def run(batches: Iterator[B]) -> Iterator[tuple[B, T]]:
        assert pool is not None
        submitted = ((batch, pool.submit(_run, batch)) for batch in batches)
        try:
            # Enough pending batches that no worker waits, few enough to bound memory.
            pending = deque(islice(submitted, 4 * workers))
            while pending:
                batch, future = pending.popleft()
                result = result_of(pool, future)
                pending.extend(islice(submitted, 1))
                yield batch, result
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, probably out of memory; reduce --workers") from error

    pool = None
    try:
        pool = started_pool(workers, work)
        yield run
    finally:
        # They have no work that matters any more. To stop them, the executor would wait for a long document, or for a
        # lock of one that was killed.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def load_in_process[T](load: Callable[..., T], *arguments: Any) -> T:
    """Call a function that loads a tokenizer in a separate process, so that workers do not inherit its imports.

    Raises:
        UserError: The function did, or its process was killed.
    """
    with started_pool(1) as pool:
        try:
            return cast(T, result_of(pool, pool.submit(load, *arguments)))
        except BrokenProcessPool as error:
            raise UserError(
                "the process that loads the tokenizer was killed, probably out of memory; free some memory"
            ) from error


def result_of(pool: ProcessPoolExecutor, future: Future[Any]) -> Any:
    """Wait for a result, and end the others if a worker was killed.

    The executor reads a result that was being sent to its end, for which it would wait as long as any worker lives:
    they all hold the sending end.

    Raises:
        BrokenProcessPool: A worker was killed, or the executor's thread that reads results has ended.
    """
    while True:
        reader: Any = pool._executor_manager_thread
        try:
            return future.result(timeout=_CHECK_EVERY_S)
        except TimeoutError:
            if future.done():
                return future.result()  # the work itself may have raised it
            if reader and not reader.is_alive():
                raise BrokenProcessPool("nothing reads its results") from None
            workers = [*(pool._processes or {}).values()]
            if not all(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.kill()


def started_pool(workers: int, work: Callable[[Any], Any] | None = None) -> Any:
    """An executor whose worker processes are forked now, and end if this process is killed.

    A worker may be killed while it sends a result. The executor would wait for the rest of it indefinitely, because
    this process could still send it: it holds the sending end of that pipe too.
    """
    close_connections()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (work,))
    # Python warns of forking while there are threads. The only threads here are numpy's, which the workers do not use;
    # pyarrow's threads, which read, start later.
    # A signal between the forks would leave workers that nobody stops, and a worker that has not begun must not take
    # SIGTERM for a signal to defer: the executor ends it so if another one was killed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with deferred_signals(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool._result_queue._writer.close()  # type: ignore[attr-defined]
    return pool


def _start_worker(work: Callable[[Any], Any] | None) -> None:
    global _work
    if work is not None:
        _work = work
    # Ctrl-C reaches the entire process group; only the parent handles it. SIGTERM ends the worker itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers sets the number of cores
    kill_with_parent()  # it can't stop its workers if it is killed, and they would wait indefinitely
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it has been
        os._exit(1)


@reports_panics()
def _run(batch: Any) -> Any:
    return _work(batch)
