"""Worker processes that encode batches; results come in the batches' order, however many workers."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from data_tools.preprocessing.encoder import EncodedBatch, Encoder
from data_tools.preprocessing.long_documents import encode_long_line
from data_tools.preprocessing.readers import Batch
from moelpr.errors import UserError

# Set just before the workers are forked, so that they inherit a loaded tokenizer.
_encoder: Encoder | None = None
_spool: Path | None = None


class EncodingPool:
    """Worker processes with an encoder each; they start with the pool.

    Args:
        spool: a folder for what is too long for memory.
    """

    def __init__(self, encoder: Encoder, workers: int, spool: Path) -> None:
        global _encoder, _spool
        _encoder, _spool = encoder, spool
        self._workers = workers
        others = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
        with warnings.catch_warnings():
            # Python warns of forking beside threads. The only ones here belong to numpy, which the workers leave alone;
            # those of pyarrow, which reads, start later.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pool.submit(os.getpid)
        self._processes = set(multiprocessing.active_children()) - others

    def encode(self, batches: Iterator[Batch]) -> Iterator[EncodedBatch]:
        """Encoded batches.

        Raises:
            UserError: a worker's, or a worker was killed.
        """
        # Enough under way that no worker waits; a bound on memory.
        pending: deque[Future[EncodedBatch]] = deque(
            self._submit(batch) for batch in islice(batches, 4 * self._workers)
        )
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(self._submit(batch) for batch in islice(batches, 1))
                yield result
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for want of memory; pass fewer --workers"
            ) from error

    def _submit(self, batch: Batch) -> "Future[EncodedBatch]":
        return self._pool.submit(_encode, batch)

    def __enter__(self) -> "EncodingPool":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        global _encoder
        _encoder = None
        if error is not None:
            for worker in self._processes:
                worker.kill()  # it may be at a long document, and nobody waits for that any more
        self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores to use
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # A parent that is killed can't stop its workers; they would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()


def _encode(batch: Batch) -> EncodedBatch:
    assert _encoder is not None and _spool is not None
    if batch.is_long_line:
        return encode_long_line(_encoder, batch, _spool)
    return _encoder.encode(batch)
