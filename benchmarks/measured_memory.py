"""One rank of a real training run that counts its own bytes; benchmarks/memory_plan.py starts it under torchrun.

    python -m moelpr.torchrun … -m benchmarks.measured_memory FOLDER <arguments of moelpr.pretrain>

Trains as `moelpr.pretrain` does and writes FOLDER/rank<r>.json when the run has ended.
"""

import json
import os
import sys
from collections import Counter
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

    from moelpr.training.train import train

    out = Path(sys.argv.pop(1))
    saved, rows, captured = SavedTensors(), RoutedRows(), []
    setup = megatron_training.setup_model_and_optimizer

    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        captured[:] = parameters_of(result[0]), result[0], result[1]
        saved.parameter_storages = {storage_of(parameter) for parameter in captured[0]}
        rows.watch(result[0])
        return result

    megatron_training.setup_model_and_optimizer = setup_and_keep
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor)
    with counted_traffic() as traffic, hooks:
        train(sys.argv[1:])
    parameters, model, optimizer = captured
    report = {
        **parameter_bytes(parameters),
        **gradient_bytes(parameters, model),
        "optimizer_bytes": optimizer_bytes(parameters, optimizer),
        "activation_bytes": saved.peak,
        **rows.means(),
        "all_to_all_bytes": traffic.sent(),
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


class RoutedRows:
    """Rows that reached new and original experts, per call."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {"new_rows": [], "original_rows": []}

    def watch(self, model: list[torch.nn.Module]) -> None:
        from moelpr.model.layer import LPRMoELayer

        new, original = self.counts["new_rows"], self.counts["original_rows"]
        for layer in (module for chunk in model for module in chunk.modules() if isinstance(module, LPRMoELayer)):
            layer.experts.register_forward_pre_hook(lambda _, inputs: new.append(len(inputs[0])))
            layer.original_experts.register_forward_pre_hook(
                lambda _, inputs: original.append(sum(map(len, inputs[2])))
            )

    def means(self) -> dict[str, float]:
        return {name: sum(rows) / max(len(rows), 1) for name, rows in self.counts.items()}


def parameters_of(model: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in model for parameter in chunk.parameters()]


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def parameter_bytes(parameters: list[torch.nn.Parameter]) -> dict[str, int]:
    counts = dict.fromkeys(("trainable", "frozen", "trainable_bytes", "frozen_bytes", "frozen_state_bytes"), 0)
    for parameter in parameters:
        kind = "trainable" if parameter.requires_grad else "frozen"
        counts[kind] += parameter.numel()
        counts[f"{kind}_bytes"] += parameter.nbytes
        if kind == "frozen":
            states = (getattr(parameter, name, None) for name in ("grad", "main_grad", "main_param"))
            counts["frozen_state_bytes"] += sum(tensor.nbytes for tensor in states if tensor is not None)
    return counts


def gradient_bytes(parameters: list[torch.nn.Parameter], model: list[Any]) -> dict[str, int]:
    """Gradients, and the padding in the buffers of Megatron's data parallelism."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    total = sum(buffer.grad_data.nbytes for buffer in buffers)
    used = sum(parameter.main_grad.nbytes for parameter in parameters if parameter.requires_grad)
    return {"gradient_bytes": used, "gradient_padding_bytes": total - used}


def optimizer_bytes(parameters: list[torch.nn.Parameter], optimizer: Any) -> int:
    """Main parameters and moments, without storages of the model's parameters and scalars (Adam's step)."""
    optimizers = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer]) if one.optimizer]
    trained = [(one, main) for one in optimizers for group in one.param_groups for main in group["params"]]
    known, total = {storage_of(parameter) for parameter in parameters}, 0
    for tensor in (tensor for one, main in trained for tensor in (main, *one.state[main].values())):
        if torch.is_tensor(tensor) and tensor.numel() > 1 and storage_of(tensor) not in known:
            known.add(storage_of(tensor))
            total += tensor.nbytes
    return total


if __name__ == "__main__":
    main()
