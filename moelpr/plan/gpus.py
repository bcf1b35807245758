"""The GPUs that the planner knows, and clusters of them. The numbers' sources are in docs/design/planner.md."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Self

from moelpr.base.errors import UserError
from moelpr.plan.layouts import neighbors

GIB = 1 << 30
RESERVED_FRACTION = 0.1  # the share of a GPU's memory that stays free, unless the user chooses


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, in a node where each GPU has its own network adapter."""

    memory_gib: float  # as nvidia-smi shows it; data sheets say GB
    flops: float  # operations per second of bf16 matrix products with sums in fp32, without sparsity
    memory_bandwidth: float  # bytes per second
    node_bandwidth: float  # bytes per second to the GPUs of the same node, in one direction (data sheets add up both)
    network_bandwidth: float  # bytes per second to other nodes, in one direction


_PCIE4, _PCIE5 = 32e9, 64e9  # 16 lanes
GPUS = {
    "a800-80": Gpu(80, 312e12, 2.039e12, 200e9, 25e9),
    "a100-40": Gpu(40, 312e12, 1.555e12, 300e9, 25e9),
    "a100-80": Gpu(80, 312e12, 2.039e12, 300e9, 25e9),
    "a100-pcie-40": Gpu(40, 312e12, 1.555e12, _PCIE4, 12.5e9),
    "a100-pcie-80": Gpu(80, 312e12, 1.935e12, _PCIE4, 12.5e9),
    "h100-80": Gpu(80, 989e12, 3.35e12, 450e9, 50e9),
    "h100-pcie-80": Gpu(80, 756e12, 2e12, _PCIE5, 12.5e9),
    "h100-nvl-94": Gpu(94, 835e12, 3.9e12, _PCIE5, 12.5e9),
    "h200-141": Gpu(141, 989e12, 4.8e12, 450e9, 50e9),
    "gh200-96": Gpu(96, 990e12, 4e12, 450e9, 50e9),
    "gh200-144": Gpu(144, 990e12, 4.9e12, 450e9, 50e9),
    "b200-192": Gpu(180, 2250e12, 8e12, 900e9, 50e9),  # a DGX B200 exposes 180 of its 192 GB
    "l40s-48": Gpu(45, 362e12, 0.864e12, _PCIE4, 12.5e9),  # error correction takes a sixteenth of the 48 GB
    "rtx6000ada-48": Gpu(48, 364e12, 0.96e12, _PCIE4, 1.25e9),
    "a10-24": Gpu(22.5, 125e12, 0.6e12, _PCIE4, 12.5e9),
    "l4-24": Gpu(22.5, 121e12, 0.3e12, _PCIE4, 12.5e9),
    "rtx4090-24": Gpu(24, 165e12, 1.008e12, _PCIE4, 1.25e9),
    "rtx5090-32": Gpu(32, 209e12, 1.792e12, _PCIE5, 1.25e9),
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for; `reserve_gib` of the memory per GPU stay free. Without `gpu` no time is shown."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    reserve_gib: float
    gpu: Gpu | None = None

    def __post_init__(self) -> None:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus must be a multiple of --gpus-per-node {self.gpus_per_node}, got {self.gpus}; use --gpus "
                f"{neighbors(self.gpus, self.gpus_per_node)}, or change --gpus-per-node"
            )

    @classmethod
    def of(cls, gpu: Gpu, gpus: int, gpus_per_node: int = 8) -> Self:
        """GPUs that the planner knows, of which `RESERVED_FRACTION` stays free."""
        return cls(gpus, gpus_per_node, gpu.memory_gib, gpu.memory_gib * RESERVED_FRACTION, gpu)

    @property
    def usable_bytes(self) -> float:
        return (self.gpu_memory_gib - self.reserve_gib) * GIB

    def leaves_node(self, group: int) -> bool:
        """Whether groups of that many neighboring ranks span several nodes."""
        return self.gpus > self.gpus_per_node and self.gpus_per_node % group != 0


def gpu_named(name: str, memory_gib: float) -> Gpu | None:
    """The GPU by the name and the memory that torch or nvidia-smi reports; None if the planner does not know it."""
    words = re.sub(r"(?<=rtx) (?=\d)|(?<=\d) (?=ada)", "", name.lower())
    variants = set(re.findall(r"pcie|nvl|laptop|mig|\bd\b", words))
    for key, gpu in GPUS.items():
        model, *variant, _ = key.split("-")
        is_model = re.search(rf"(?<![a-z0-9]){model}(?![a-z0-9])", words) and variants == set(variant)
        if is_model and abs(memory_gib / gpu.memory_gib - 1) < 0.1:
            return gpu
    return None


# In a process of its own, as CUDA occupies memory of a GPU until its process ends.
_ASK_TORCH = """
import torch
for index in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(index)
    print(f"{gpu.name}, {gpu.total_memory >> 20}")
"""


def gpus_here() -> list[tuple[str, float]]:
    """Name and GiB of memory of each GPU of this machine, as torch sees them, or nvidia-smi if torch sees none."""
    gpus = gpus_of_torch()
    if not gpus and "CUDA_VISIBLE_DEVICES" not in os.environ and (program := shutil.which("nvidia-smi")):
        gpus = _answer(program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    return gpus


def gpus_of_torch() -> list[tuple[str, float]]:
    """Name and GiB of memory of each GPU that torch sees."""
    return _answer(sys.executable, "-c", _ASK_TORCH)


def _answer(*command: str) -> list[tuple[str, float]]:
    """The names and GiB that a command prints; none if it fails, as without torch or without a driver."""
    answer = subprocess.run(command, capture_output=True, text=True)
    lines = (line.rsplit(",", 1) for line in answer.stdout.splitlines() if answer.returncode == 0)
    return [(name, int(mib) / 1024) for name, mib in lines]


def cluster_here(gpus: int | None = None) -> Cluster:
    """The GPUs of this machine, or so many in machines like this one; UserError if there are none."""
    devices = gpus_here()
    if not devices:
        raise UserError(
            "this machine has no NVIDIA GPU; name the GPUs that will train, one of "
            f"{', '.join(GPUS)}, and their number, or their memory"
        )
    name, memory_gib = min(devices, key=lambda one: one[1])
    gpu = gpu_named(name, memory_gib) if len({name for name, _ in devices}) == 1 else None
    return Cluster(gpus or len(devices), len(devices), memory_gib, memory_gib * RESERVED_FRACTION, gpu)
