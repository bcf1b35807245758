"""Training may continue while a checkpoint is written: saved is what was there when saving began."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("megatron")


def staged(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as Megatron's helper process would write it."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    (bucket,) = FileSystemWriterAsync.preload_tensors([("file", "key", ([], [("item", tensor)]))])
    assert bucket[:2] == ("file", "key")
    ((item, found),) = bucket[2][1]
    assert item == "item"
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the helper copies GPU tensors")
def test_the_helper_writes_a_copy_but_megatrons_own_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from moelpr.megatron_patches import async_save

    calls = []
    monkeypatch.setattr(FileSystemWriterAsync, "preload_tensors", FileSystemWriterAsync.preload_tensors)
    monkeypatch.setattr(PersistentAsyncCaller, "async_loop", lambda *args, **kwargs: calls.append((args, kwargs)))
    tensor = torch.ones(3)
    before = staged(tensor)
    async_save.worker(0, "queue", log_level=1)
    assert calls == [((0, "queue"), {"log_level": 1})]
    saved = staged(tensor)
    tensor.zero_()
    assert before.sum() == 0, "Megatron copies CPU tensors itself: remove the patch"
    assert saved.sum() == 3


def test_the_helper_runs_our_worker() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from moelpr.megatron_patches import async_save, cpu

    if cpu.is_needed():
        assert PersistentAsyncCaller.async_loop is async_save.worker
