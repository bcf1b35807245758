"""`--async-save`: the helper gets tensors of the host only, and the run ends with it."""

import os
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller
from torch._subclasses.fake_tensor import FakeTensorMode

from moelpr.base.errors import MachineError
from moelpr.model.megatron import async_save
from tests.support.async_save_helpers import be_killed, exit_at_once, lack_memory, read_nothing

pytestmark = pytest.mark.usefixtures("megatron")


def request_of(*tensors: torch.Tensor, function: Callable[..., None] = os.getpid) -> AsyncRequest:
    buckets = [("folder/file", "file", (["bytes"], [("item", tensor) for tensor in tensors]))]
    return AsyncRequest(function, (0, buckets, None), [], preload_fn=lambda: buckets)


def tensors_of(request: AsyncRequest) -> list[torch.Tensor]:
    ((_, _, (_, tensors)),) = request.async_fn_args[1]
    return [tensor for _, tensor in tensors]


def test_no_tensor_of_a_gpu_is_sent() -> None:
    with FakeTensorMode():
        sent = async_save.on_the_host(request_of(torch.empty(3, device="cuda"), torch.nn.Parameter(torch.empty(2))))
        assert [(tensor.device.type, tensor.requires_grad) for tensor in tensors_of(sent)] == [("cpu", False)] * 2
    assert sent.preload_fn is None and sent.async_fn_args[0::2] == (0, None)


def test_training_does_not_change_what_is_saved() -> None:
    trained = torch.ones(3)
    (sent,) = tensors_of(async_save.on_the_host(request_of(trained)))
    trained.zero_()
    assert sent.tolist() == [1, 1, 1]


@pytest.fixture
def caller(request: pytest.FixtureRequest) -> Iterator[PersistentAsyncCaller]:
    """Megatron's side of a helper that runs the function of this parameter."""
    with patch.object(PersistentAsyncCaller, "async_loop", staticmethod(request.param)):
        PersistentAsyncCaller._get_process(0, mp_mode="spawn")
    caller = PersistentAsyncCaller()
    yield caller
    caller.close()
    async_save._failures.clear()


@pytest.mark.parametrize("caller", [exit_at_once, be_killed, lack_memory], indirect=True)
@pytest.mark.parametrize("blocking", [True, False])
def test_a_helper_that_ends_ends_the_run(caller: PersistentAsyncCaller, blocking: bool) -> None:
    caller.schedule_async_call(request_of(torch.ones(3)))
    with pytest.raises(MachineError, match=r"writes checkpoints .*exit code (3|-9|1)\b"):
        while not caller.is_current_async_call_done(blocking):
            pass


@pytest.mark.parametrize("caller", [read_nothing], indirect=True)
def test_a_request_that_cannot_be_sent_ends_the_run(caller: PersistentAsyncCaller) -> None:
    caller.schedule_async_call(request_of(torch.ones(3), function=lambda: None))
    with pytest.raises(MachineError, match="failed .*lambda"):
        caller.is_current_async_call_done(blocking=True)
