import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from moelpr.base import checksums
from moelpr.base.checksums import FileSum
from moelpr.base.run_folder import TABLE_FILES
from moelpr.model.checkpoints.chain import write_checksums
from moelpr.model.megatron import checkpoint_sums

pytestmark = pytest.mark.usefixtures("megatron")


def save(folder: Path) -> None:
    """Save a tensor and an object as the trainer does without --async-save."""
    folder.mkdir()
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.randn(300, 40)), "step": 3}
    dist_checkpointing.save(state, folder, TorchDistSaveShardedStrategy(thread_count=2))


def test_no_file_with_tensors_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, read, of = tmp_path / "iter_0000001", [], FileSum.of
    save(step)
    monkeypatch.setattr(FileSum, "of", lambda path, *more: (read.append(path.name), of(path, *more))[1])
    write_checksums(step, checkpoint_sums.taken(step))
    assert {*read} <= {*TABLE_FILES}
    actual = checksums.read(step)
    assert actual is not None and any(name.endswith(".distcp") for name in actual)
    assert actual == {name: of(step / name) for name in actual}
    assert checkpoint_sums.taken(step) == {}


def test_a_helper_process_sends_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports nothing of ours but what it is told to call."""
    manager, sent = multiprocessing.get_context("spawn").Manager(), []
    get = FileSystemWriterAsync.get_save_function_and_args

    def in_helper(save: Any, rank: int, buckets: list, results: Any) -> None:
        sums = manager.Queue()
        helper = multiprocessing.get_context("spawn").Process(target=save, args=(rank, buckets, sums))
        helper.start()
        helper.join(60)
        sent.append(sums.get_nowait())
        results.put(sent[-1])

    def get_for_helper(self: Any) -> tuple:
        save, preload, args = get(self)
        return partial(in_helper, save), preload, args

    monkeypatch.setattr(FileSystemWriterAsync, "get_save_function_and_args", get_for_helper)
    step = tmp_path / "iter_0000001"
    save(step)
    manager.shutdown()
    assert sent and checkpoint_sums.taken(step) == {Path(path).name: FileSum.of(Path(path)) for path in sent[0][1]}
