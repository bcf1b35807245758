"""One rank of the real trainer with random weights: the steps of several runs, one after the other.

    python -m moelpr.torchrun --standalone --nproc-per-node 8 -m benchmarks.trainer_steps FOLDER

FOLDER/runs.json maps names of runs to arguments of moelpr.pretrain; their checkpoint needs no weights. Each rank writes
FOLDER/rank<r>.json with its device and the rate of a large matrix product; the last rank also the records of the steps,
and how much memory was still occupied by the run before.
"""

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import install_megatron

# Calls of CUDA in which the host waits for the GPU.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def main() -> None:
    install_megatron()
    import torch
    from megatron.training.training import destroy_global_state

    from moelpr.base.ranks import rank
    from moelpr.model.megatron import bootstrap, cpu
    from moelpr.train import train as training

    folder, has_gpu = Path(sys.argv[1]), not cpu.is_needed()
    bootstrap.connect_ranks()
    device = torch.cuda.get_device_name() if has_gpu else "CPU"
    report: dict[str, Any] = {"device": device, "matmul_flops": matmul_flops(has_gpu), "runs": {}}
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        steps: list[dict[str, Any]] = []
        gc.collect()  # models of the run before are parts of reference cycles
        if has_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        report["runs"][name] = {"held_gib": torch.cuda.memory_allocated() / 2**30, "steps": steps}
        with profiles_the_last_of(steps, arguments):
            training.train(arguments, weights=training.keep_weights)
        (folder / f"rank{rank()}.json").write_text(json.dumps(report))
        destroy_global_state()
    torch.distributed.destroy_process_group()


@contextmanager
def profiles_the_last_of(steps: list[dict[str, Any]], arguments: list[str]) -> Iterator[None]:
    """Add each step's record to `steps`, and the kernels and waits of the last one to its record, if there is a GPU."""
    import torch

    profiler = torch.profiler.profile() if torch.cuda.is_available() else None
    last = int(arguments[arguments.index("--train-iters") + 1])

    def step(_: Any, record: dict[str, Any]) -> None:
        steps.append(record)
        if profiler and len(steps) == last - 1:
            profiler.start()
        elif profiler and len(steps) == last:
            profiler.stop()
            record |= kernels_and_waits(profiler.events())

    with patch("moelpr.train.run_log.RunLog.write", step):
        yield


def kernels_and_waits(events: Iterable[Any]) -> dict[str, int]:
    """The numbers of kernels and copies on the GPU, without NCCL's, and of waits of the host, among profiled events."""
    import torch

    names = [(event.device_type == torch.autograd.DeviceType.CUDA, event.name) for event in events]
    return {
        "kernels": sum(on_gpu and not name.startswith("nccl") for on_gpu, name in names),
        "waits": sum(not on_gpu and name in WAITS for on_gpu, name in names),
    }


def matmul_flops(has_gpu: bool) -> float:
    """Operations per second of a large product, in bf16 on a GPU and fp32 on a CPU; the fastest of ten."""
    import torch

    from benchmarks.timing import Turns

    kind, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    size, device = MATMUL_SIZE[kind], torch.cuda.current_device()
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(Turns(1).seconds(lambda: left @ right) for _ in range(10))


if __name__ == "__main__":
    main()
