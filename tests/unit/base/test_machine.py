"""Threads, CPUs and memory that a process may use, with the limits of its control groups."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.base import machine

CPUS = len(os.sched_getaffinity(0))


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is in the group /job/step, of version 2."""
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "self").write_text("0::/job/step\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "self")
    return tmp_path


def test_without_limits_the_affinity_counts(cgroups: Path) -> None:
    (cgroups / "job/cpu.max").write_text("max 100000\n")
    (cgroups / "job/memory.max").write_text("max\n")
    assert machine.available_cpus() == CPUS
    assert machine.total_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.free_memory() < machine.total_memory()


@pytest.mark.parametrize(("quota", "cpus"), [("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", CPUS)])
def test_a_control_group_around_this_one_limits_the_cpus(cgroups: Path, quota: str, cpus: int) -> None:
    (cgroups / "job/cpu.max").write_text(quota)
    (cgroups / "job/step/cpu.max").write_text("max 100000")
    assert machine.available_cpus() == cpus


@pytest.mark.parametrize("path", ["/job/step", "/a/path/of/the/host"])
def test_limits_of_version_1_are_read_also_if_only_the_root_is_visible(cgroups: Path, path: str) -> None:
    (cgroups / "self").write_text(f"5:memory:{path}\n4:cpu,cpuacct:{path}\n0::{path}\n")
    files = {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}
    files |= {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "900"}
    files |= {"memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300"}
    for file, content in files.items():
        (cgroups / file).parent.mkdir(exist_ok=True)
        (cgroups / file).write_text(content)
    assert machine.available_cpus() == 1
    assert (machine.total_memory(), machine.free_memory()) == (1000, 400)


def test_the_tightest_memory_limit_counts_and_cached_files_are_free(cgroups: Path) -> None:
    for folder, limit, used, cached in (("job", 1000, 900, 500), ("job/step", 2000, 1900, 0)):
        (cgroups / folder / "memory.max").write_text(str(limit))
        (cgroups / folder / "memory.current").write_text(str(used))
        (cgroups / folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert (machine.total_memory(), machine.free_memory()) == (1000, 100)


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [
        (None, ["nvidia0", "nvidiactl"], True),
        ("1", ["nvidia0", "nvidia1"], True),
        (None, ["nvidiactl"], False),
        ("0", [], False),
        ("", ["nvidia0"], False),
        ("-1", ["nvidia0"], False),
        (None, ["dxg"], True),  # WSL2, whose nvidia-smi exists only with NVIDIA's driver
        ("-1", ["dxg"], False),
    ],
)
def test_gpus_are_device_files_that_are_not_hidden(tmp_path, monkeypatch, visible, devices, expected) -> None:
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/lib/wsl/lib/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.has_gpus() == expected


def test_the_peak_memory_of_a_process_is_the_kernels() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert before * 0.9 <= machine.peak_memory(os.getpid()) <= before * 1.5
    assert machine.peak_memory(2**22 + 1) == 0
    assert machine.format_bytes(3 << 29) == "1.5 GiB"


def threads(code: str, **variables: str) -> list[str]:
    """The settings that OpenMP would read after `code`, in a new process on four CPUs."""
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name and "MOELPR_" not in name}
    code += "; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('OMP_NUM_THREADS', '-'))"
    command = [sys.executable, "-c", f"import os; os.sched_getaffinity = lambda pid: {{0, 1, 2, 3}}; {code}"]
    return subprocess.check_output(command, env=environment | variables, text=True).split()


@pytest.mark.parametrize("package", ["moelpr.base.errors", "data_tools", "checkpoint_convert"])
def test_importing_a_package_makes_waiting_threads_sleep_unless_the_user_decides(package: str) -> None:
    assert threads(f"import {package}")[0] == "passive"
    assert threads(f"import {package}", OMP_WAIT_POLICY="active", OMP_NUM_THREADS="7") == ["active", "7"]


def test_ranks_share_the_cpus_unless_the_user_decides() -> None:
    share = "from moelpr.base import machine; machine.available_cpus = lambda: 4; machine.share_threads({})"
    assert [threads(share.format(ranks))[1] for ranks in (1, 2, 3, 5)] == ["4", "2", "1", "1"]
    assert threads(share.format(2), OMP_NUM_THREADS="7")[1] == "7"
    inherited = {"OMP_NUM_THREADS": "4", "MOELPR_NUM_THREADS": "4"}  # from a command that has limited itself
    assert threads(share.format(2), **inherited)[1] == "2"
    assert threads("import moelpr.base.machine", **inherited)[1] == "4"


def test_a_limit_below_the_affinity_limits_the_threads(cgroups: Path) -> None:
    (cgroups / "cpu.max").write_text("100000 100000")
    limit = f"from pathlib import Path; from moelpr.base import machine; machine._CGROUPS = Path({str(cgroups)!r}); "
    limit += f"machine._OWN_CGROUPS = Path({str(cgroups / 'self')!r}); "
    ours = "[os.environ.pop(name, None) for name in ('OMP_NUM_THREADS', 'MOELPR_NUM_THREADS')]; "
    assert threads(f"{limit}{ours}machine.limit_threads()")[1] == "1"
    assert threads(f"{limit}machine.limit_threads()", OMP_NUM_THREADS="3")[1] == "3"
