"""`--async-save`: a helper process writes a checkpoint while training continues, and its end ends the run."""

from collections.abc import Callable
from queue import Empty
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller

from moelpr.base.errors import MachineError, first_line
from moelpr.model.megatron.replacing import replaces

# Seconds between two looks at whether the helper is still there.
_INTERVAL_S = 1.0
_failures: list[Exception] = []


def install() -> None:
    """Let the trainer copy tensors to the host and notice when the helper ends.

    Megatron sends CUDA tensors to the helper, which may not be allowed to open them: with expandable segments that
    needs the right to trace the trainer (ptrace), which containers and Ubuntu deny. It ends, and Megatron waits for it.
    """

    @replaces(PersistentAsyncCaller, "_get_process")
    def start(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        process = original(*args, **kwargs)
        # The queue's thread would print what it cannot send, and forget it.
        PersistentAsyncCaller._persistent_queue._on_queue_feeder_error = lambda error, _: _failures.append(error)
        return process

    @replaces(PersistentAsyncCaller, "schedule_async_call")
    def schedule(original: Callable[..., None], self: Any, request: AsyncRequest) -> None:
        original(self, on_the_host(request))

    @replaces(PersistentAsyncCaller, "is_current_async_call_done")
    def is_done(original: Callable[..., bool], self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while self.process and self.cur_item is None:
            try:
                self.cur_item = self._persistent_comp_q.get(timeout=_INTERVAL_S if blocking else 0)
            except Empty:
                if _failures or not self.process.is_alive():
                    self._persistent_queue.cancel_join_thread()  # nobody reads what is left in it
                    raise helper_ended(self.process.exitcode) from None
                if not blocking:
                    break
        return original(self, blocking and self.cur_item is None, no_dist)

    @replaces(PersistentAsyncCaller, "close")
    def close(original: Callable[..., None], self: Any, abort: bool = False) -> None:
        original(self, abort or bool(_failures or self.process and not self.process.is_alive()))


def on_the_host(request: AsyncRequest) -> AsyncRequest:
    """The request with copies of its tensors in the host's memory, which training does not change."""
    if request.preload_fn is None:
        return request
    rank, buckets, *others = request.async_fn_args
    copies = [
        (path, name, (objects, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors]))
        for path, name, (objects, tensors) in buckets
    ]
    return request._replace(async_fn_args=(rank, copies, *others), preload_fn=None)


def helper_ended(exitcode: int | None) -> MachineError:
    """The error that ends the run: the step before is complete."""
    why = first_line(_failures[0]) if _failures else f"exit code {exitcode}"
    return MachineError(
        f"the process that writes checkpoints for --async-save failed ({why}); check the memory of the host and of "
        "/dev/shm, and run the same command again, without --async-save if this repeats, to resume from the last step "
        "that was saved"
    )
