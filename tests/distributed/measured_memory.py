"""One rank of a real training run that counts its own bytes; tests/distributed/memory_plan.py starts it under torchrun.

    python -m moelpr.torchrun … -m tests.distributed.measured_memory FOLDER <arguments of moelpr.pretrain>

Trains as `moelpr.pretrain` does and writes FOLDER/rank<r>.json when the run has ended.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import install_megatron
from benchmarks.traffic import counted_traffic


class SavedTensors:
    """Bytes that autograd keeps for the backward pass: now and at most. Each storage counts once, parameters never.

    Only live storages count, so micro-batches in flight and recomputed layers have their true size.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.parameter_storages: set[int] = set()
        self._holders: Counter[int] = Counter()

    def pack(self, tensor: torch.Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameter_storages:
            return _Held(tensor, None, self)
        if self._holders[storage.data_ptr()] == 0:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._holders[storage.data_ptr()] += 1
        return _Held(tensor, storage, self)

    def release(self, storage: torch.UntypedStorage) -> None:
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self.live -= storage.nbytes()


class _Held:
    """A saved tensor; its storage stops counting when autograd releases it."""

    def __init__(self, tensor: torch.Tensor, storage: torch.UntypedStorage | None, counter: SavedTensors) -> None:
        self.tensor, self._storage, self._counter = tensor.detach(), storage, counter

    def __del__(self) -> None:
        if self._storage is not None:
            self._counter.release(self._storage)


def main() -> None:
    install_megatron()
    from megatron.training import training as megatron_training

    from moelpr.train.train import train

    out = Path(sys.argv.pop(1))
    saved = SavedTensors()
    captured: list[Any] = []
    rows: dict[str, list[int]] = {"new_rows": [], "original_rows": []}
    setup = megatron_training.setup_model_and_optimizer

    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        captured[:] = result[:2]
        saved.parameter_storages = {storage_of(parameter) for chunk in result[0] for parameter in chunk.parameters()}
        count_rows(result[0], rows)
        return result

    megatron_training.setup_model_and_optimizer = setup_and_keep
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor)
    with counted_traffic() as traffic, hooks:
        train(sys.argv[1:])
    report = {
        **state_bytes(*captured),
        "activation_bytes": saved.peak,
        **{name: sum(counts) / max(len(counts), 1) for name, counts in rows.items()},
        "all_to_all_bytes": traffic.sent(),
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


def count_rows(model: list[torch.nn.Module], rows: dict[str, list[int]]) -> None:
    """Append the number of rows that reach new and original experts to `rows` at every call."""
    from moelpr.model.layers.layer import LPRMoELayer

    new, original = rows["new_rows"], rows["original_rows"]
    for layer in (module for chunk in model for module in chunk.modules() if isinstance(module, LPRMoELayer)):
        layer.experts.register_forward_pre_hook(lambda _, inputs: new.append(len(inputs[0])))
        layer.original_experts.register_forward_pre_hook(lambda _, inputs: original.append(sum(map(len, inputs[2]))))


def state_bytes(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Parameters and their bytes; bytes of gradients, of the padding in their buffers, and of the optimizer."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    frozen_states = (getattr(one, name, None) for one in frozen for name in ("grad", "main_grad", "main_param"))
    gradients = num_bytes(parameter.main_grad for parameter in trainable)
    buffers = [buffer.grad_data for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "trainable": sum(parameter.numel() for parameter in trainable),
        "frozen": sum(parameter.numel() for parameter in frozen),
        "trainable_bytes": num_bytes(trainable),
        "frozen_bytes": num_bytes(frozen),
        "frozen_state_bytes": num_bytes(state for state in frozen_states if state is not None),
        "gradient_bytes": gradients,
        "gradient_padding_bytes": num_bytes(buffers) - gradients,
        "optimizer_bytes": optimizer_bytes(parameters, optimizer),
    }


def optimizer_bytes(parameters: list[Any], optimizer: Any) -> int:
    """Main parameters and moments, without storages of the model's parameters and scalars (Adam's step)."""
    optimizers = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer]) if one.optimizer]
    trained = [(one, main) for one in optimizers for group in one.param_groups for main in group["params"]]
    states = (state for one, main in trained for state in (main, *one.state[main].values()) if torch.is_tensor(state))
    own = {storage_of(state): state for state in states if state.numel() > 1}
    return num_bytes(own[storage] for storage in own.keys() - {storage_of(parameter) for parameter in parameters})


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


if __name__ == "__main__":
    main()
