from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.plan import gpus
from moelpr.plan.gpus import GPUS, Cluster, cluster_here, gpu_named, gpus_here
from tests.support.programs import put_on_path


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80"),
        ("NVIDIA B200", 178.4, "b200-192"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-pcie-40"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-pcie-80"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl-94"),
        ("NVIDIA GH200 144G HBM3e", 139.8, "gh200-144"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000ada-48"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24"),
        ("NVIDIA A10", 22.5, "a10-24"),
        ("NVIDIA A10G", 22.5, None),
        ("NVIDIA H200 NVL", 139.8, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.4, None),
    ],
)
def test_gpus_are_known_by_name_and_memory(name: str, memory_gib: float, key: str | None) -> None:
    assert gpu_named(name, memory_gib) is (GPUS[key] if key else None)


def test_a_group_leaves_a_node_unless_nodes_are_multiples_of_it() -> None:
    cluster = Cluster(gpus=16, gpus_per_node=8, gpu_memory_gib=80, reserve_gib=8)
    assert [cluster.leaves_node(group) for group in (1, 4, 8, 16, 6)] == [False, False, False, True, True]
    assert not Cluster(gpus=6, gpus_per_node=8, gpu_memory_gib=80, reserve_gib=8).leaves_node(6)


def test_nvidia_smi_is_asked_if_torch_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = "echo 'NVIDIA GeForce RTX 4090, 24564'; echo 'NVIDIA GeForce RTX 4090, 24564'"
    put_on_path(monkeypatch, tmp_path, {"nvidia-smi": two})
    monkeypatch.setattr(gpus, "_ASK_TORCH", "raise ImportError")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_here() == [("NVIDIA GeForce RTX 4090", 24564 / 1024)] * 2
    actual = cluster_here()
    assert (actual.gpus, actual.gpus_per_node, actual.gpu) == (2, 2, GPUS["rtx4090-24"])
    put_on_path(monkeypatch, tmp_path, {"nvidia-smi": "echo 'NVIDIA-SMI has failed'; exit 9"})
    assert gpus_here() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_here() == []


def test_a_machine_with_different_gpus_counts_as_so_many_of_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpus_here", lambda: [("NVIDIA L40S", 44.5), ("NVIDIA GeForce RTX 4090", 24)])
    assert cluster_here() == Cluster(2, 2, 24, 2.4000000000000004)
    assert cluster_here(gpus=4) == Cluster(4, 2, 24, 2.4000000000000004)
    monkeypatch.setattr(gpus, "gpus_here", lambda: [])
    with pytest.raises(UserError, match="no NVIDIA GPU; name the GPUs"):
        cluster_here()
