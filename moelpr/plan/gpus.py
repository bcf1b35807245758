"""The GPUs that the planner knows, and clusters of them. The numbers' sources are in docs/design/planner.md."""

import re
from dataclasses import dataclass
from typing import Self

GIB = 1 << 30
RESERVED_FRACTION = 0.1  # the share of a GPU's memory that stays free, unless the user chooses


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, in a node where each GPU has its own network adapter."""

    memory_gib: float  # data sheets say GB, but mean GiB within 1%
    flops: float  # operations per second of bf16 matrix products, without sparsity
    memory_bandwidth: float  # bytes per second
    node_bandwidth: float  # bytes per second to the GPUs of the same node, in one direction (data sheets add up both)
    network_bandwidth: float  # bytes per second to other nodes, in one direction


GPUS = {
    "a800-80": Gpu(80, 312e12, 2.039e12, 200e9, 25e9),
    "a100-80": Gpu(80, 312e12, 2.039e12, 300e9, 25e9),
    "h100-80": Gpu(80, 989e12, 3.35e12, 450e9, 50e9),
    "h200-141": Gpu(141, 989e12, 4.8e12, 450e9, 50e9),
    "b200-192": Gpu(180, 2250e12, 8e12, 900e9, 50e9),  # a DGX B200 exposes 180 of its 192 GB
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for; `reserve_gib` of the memory per GPU stay free. Without `gpu` no time is predicted."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    reserve_gib: float
    gpu: Gpu | None = None

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
    """The GPU by the name and the memory that torch reports; None if it is unknown, as PCIe cards are."""
    if re.search("PCIe|NVL", name):
        return None
    for key, gpu in GPUS.items():
        if re.search(rf"\b{key.split('-')[0]}\b", name, re.IGNORECASE) and abs(memory_gib / gpu.memory_gib - 1) < 0.1:
            return gpu
    return None
