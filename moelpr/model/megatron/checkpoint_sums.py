"""Checksums of a step's files, computed while Megatron writes them: nobody reads back what was saved.

With --async-save Megatron's helper process writes the files, so the sums travel with its results.
"""

import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from moelpr.base.checksums import FileSum, SummedFile
from moelpr.model.megatron.replacing import replaces

_sums: dict[str, FileSum] = {}  # path → the sum of a file that this rank has written


def install() -> None:
    @replaces(FileSystemWriterAsync, "get_save_function_and_args")
    def save_and_sum(get: Callable[..., Any], self: Any) -> tuple[Any, Any, list[Any]]:
        save, preload, args = get(self)
        return save and partial(write_and_sum, *save.args), preload, args

    @replaces(FileSystemWriterAsync, "retrieve_write_results")
    def keep_sums(retrieve: Callable[..., Any], self: Any) -> Any:
        if self.results_queue is not None:
            try:
                results, sums = self.results_queue.get_nowait()
            except queue.Empty:  # Megatron's error
                return retrieve(self)
            _sums.update(sums)
            self.results_queue = queue.SimpleQueue()
            self.results_queue.put(results)
        return retrieve(self)


def taken(step_folder: Path) -> dict[str, FileSum]:
    """The sums of files of this folder that this rank has written, by their names; once."""
    own = [path for path in _sums if Path(path).parent == step_folder]
    return {Path(path).name: _sums.pop(path) for path in own}


def write_and_sum(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write files as Megatron does, here or in its helper, which finds this function by its name."""
    sums: dict[str, FileSum] = {}
    filesystem_async.open = lambda path, mode: _NotedFile(path, sums)  # type: ignore[attr-defined]
    written: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        FileSystemWriterAsync.write_preloaded_data_multithread(transforms, use_msc, rank, buckets, written)
    finally:
        del filesystem_async.open  # type: ignore[attr-defined]
    results.put((written.get(), sums))


class _NotedFile(SummedFile):
    """A file that notes its sum when it is complete."""

    def __init__(self, path: str, sums: dict[str, FileSum]) -> None:
        super().__init__(Path(path))
        self._path, self._sums = path, sums
        self.fileno = self._file.fileno

    def __enter__(self) -> "_NotedFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._sums[self._path] = self.finish()
        else:
            self.close()
