"""GPUs by the names that torch reports, and groups of ranks that span nodes."""

import pytest

from moelpr.plan.gpus import GPUS, Cluster, gpu_named


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80"),
        ("NVIDIA H200", 139.8, "h200-141"),
        ("NVIDIA B200", 178.4, "b200-192"),
        ("NVIDIA A100-SXM4-40GB", 39.4, None),
        ("NVIDIA H100 PCIe", 79.6, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA GeForce RTX 4090", 23.6, None),
    ],
)
def test_gpus_are_known_by_name_and_memory(name: str, memory_gib: float, key: str | None) -> None:
    assert gpu_named(name, memory_gib) is (GPUS[key] if key else None)


def test_a_group_leaves_a_node_unless_nodes_are_multiples_of_it() -> None:
    cluster = Cluster(gpus=16, gpus_per_node=8, gpu_memory_gib=80, reserve_gib=8)
    assert [cluster.leaves_node(group) for group in (1, 4, 8, 16, 6)] == [False, False, False, True, True]
    assert not Cluster(gpus=6, gpus_per_node=8, gpu_memory_gib=80, reserve_gib=8).leaves_node(6)
