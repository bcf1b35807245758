"""One rank of a real training run that counts its own bytes; `benchmarks/memory_plan.py` starts it under torchrun.

    torchrun … -m benchmarks.measured_memory OUT_FOLDER <arguments of moelpr.pretrain>

Trains as `moelpr.pretrain` does and writes OUT_FOLDER/rank<r>.json when the run has ended.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelpr.megatron_patches import cpu, megatron_fixes

cpu.install()
megatron_fixes.install()

import torch  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402

from moelpr.model.layer import LPRMoELayer  # noqa: E402
from moelpr.training.train import train  # noqa: E402


class SavedTensors:
    """Bytes that autograd holds for the backward pass: now, and at most. Every storage counts once, parameters never.

    Counting live storages, and not whatever was ever saved, makes micro-batches in flight and recomputed layers weigh
    what they weigh.
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
    """A saved tensor; lets go of its storage's count when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor, storage: torch.UntypedStorage | None, counter: SavedTensors) -> None:
        self.tensor, self._storage, self._counter = tensor.detach(), storage, counter

    def __del__(self) -> None:
        if self._storage is not None:
            self._counter.release(self._storage)


class Routed:
    """Rows that reached experts per call, and bytes that all-to-alls sent to other ranks."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.all_to_all_bytes = 0

    def watch(self, model: list[torch.nn.Module]) -> None:
        for layer in (module for chunk in model for module in chunk.modules() if isinstance(module, LPRMoELayer)):
            layer.experts.register_forward_pre_hook(lambda _, inputs: self._count("new_rows", len(inputs[0])))
            layer.original_experts.register_forward_pre_hook(
                lambda _, inputs: self._count("original_rows", sum(map(len, inputs[2])))
            )
        all_to_all = torch.distributed.all_to_all_single

        def counted(output: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            splits, group = kwargs["input_split_sizes"], kwargs["group"]
            sent = int(sum(splits) - splits[torch.distributed.get_rank(group)])
            self.all_to_all_bytes += sent * rows[:1].nbytes if len(rows) else 0
            return all_to_all(output, rows, *args, **kwargs)

        torch.distributed.all_to_all_single = counted

    def _count(self, name: str, rows: int) -> None:
        self.sums[name] += rows
        self.calls[name] += 1

    def report(self) -> dict[str, float]:
        means = {name: self.sums[name] / max(self.calls[name], 1) for name in ("new_rows", "original_rows")}
        return {**means, "all_to_all_bytes": self.all_to_all_bytes}


def main() -> None:
    out, argv = Path(sys.argv[1]), sys.argv[2:]
    sys.argv[1:] = argv
    saved, routed, captured = SavedTensors(), Routed(), []
    setup = megatron_training.setup_model_and_optimizer

    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        captured[:] = result[:2]
        saved.parameter_storages = {
            parameter.untyped_storage().data_ptr() for chunk in captured[0] for parameter in chunk.parameters()
        }
        routed.watch(captured[0])
        return result

    megatron_training.setup_model_and_optimizer = setup_and_keep
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        train(argv)
    model, optimizer = captured
    report = {
        **parameter_bytes(model),
        **gradient_bytes(model),
        **optimizer_bytes(model, optimizer),
        "activation_bytes": saved.peak,
        **routed.report(),
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


def parameter_bytes(model: list[torch.nn.Module]) -> dict[str, int]:
    counts = dict.fromkeys(("trainable", "frozen", "trainable_bytes", "frozen_bytes", "frozen_state_bytes"), 0)
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        kind = "trainable" if parameter.requires_grad else "frozen"
        counts[kind] += parameter.numel()
        counts[f"{kind}_bytes"] += parameter.nbytes
        if kind == "frozen":
            gradients = (parameter.grad, getattr(parameter, "main_grad", None), getattr(parameter, "main_param", None))
            counts["frozen_state_bytes"] += sum(tensor.nbytes for tensor in gradients if tensor is not None)
    return counts


def gradient_bytes(model: list[torch.nn.Module]) -> dict[str, int]:
    """The buffers of Megatron's data parallelism, and the padding in them."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    total = sum(buffer.grad_data.nbytes for buffer in buffers)
    used = sum(
        parameter.main_grad.nbytes for chunk in model for parameter in chunk.parameters() if parameter.requires_grad
    )
    return {"gradient_bytes": used, "gradient_padding_bytes": total - used}


def optimizer_bytes(model: list[torch.nn.Module], optimizer: Any) -> dict[str, int]:
    """Masters and moments; a storage that belongs to a parameter or is a scalar (Adam's step) is none of them."""
    known = {parameter.untyped_storage().data_ptr() for chunk in model for parameter in chunk.parameters()}
    total = 0
    for tensor in _optimizer_tensors(optimizer):
        if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            total += tensor.nbytes
    return {"optimizer_bytes": total}


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (value for value in inner.state[parameter].values() if torch.is_tensor(value))


if __name__ == "__main__":
    main()
