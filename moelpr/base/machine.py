"""The CPUs, the memory and the GPUs that this process may use, also inside a container or a batch job.

`moelpr/__init__.py` calls `limit_threads`, because OpenMP reads its settings when torch is imported.
"""

import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_DEVICES = Path("/dev")
_THREADS = "OMP_NUM_THREADS"
_OUR_THREADS = "MOELPR_NUM_THREADS"  # set by moelpr, also in a process that has started this one


def limit_threads() -> None:
    """Let waiting threads sleep, and use no more threads than CPUs, unless the user has set these variables.

    Spinning threads take the cores from other processes. OpenMP respects the CPU affinity by itself, but not the limits
    of a control group.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if _THREADS not in os.environ and (cpus := available_cpus()) < len(os.sched_getaffinity(0)):
        _set_threads(cpus)


def share_threads(num_processes: int) -> None:
    """Divide the CPUs among the processes that this one is about to start, unless the user has set the variable."""
    if os.environ.get(_THREADS) == os.environ.get(_OUR_THREADS):
        _set_threads(max(1, available_cpus() // num_processes))


def _set_threads(number: int) -> None:
    os.environ[_THREADS] = os.environ[_OUR_THREADS] = str(number)


def available_cpus() -> int:
    """CPUs that the affinity and the control groups of this process allow; a part of a CPU counts only if alone."""
    limits = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroup_folders("cpu"):
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            if (folder / "cpu.max").exists():
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:  # -1: no limit
                limits.append(quota / period)
    return max(1, int(min(limits)))


def allow_open_files() -> None:
    """Let this process open as many files as the machine's administrator allows: the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def total_memory() -> int:
    """Bytes of memory that this process and those it shares a control group with may use."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Bytes of `total_memory` that are free, or can be freed."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _memory_limits())]))


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a running process has occupied; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def has_gpus() -> bool:
    """Whether the machine has NVIDIA GPUs that CUDA_VISIBLE_DEVICES does not hide, even if PyTorch cannot use them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    is_wsl = (_DEVICES / "dxg").exists() and shutil.which("nvidia-smi") is not None  # it has no device of each GPU
    return first not in ("", "-1", "NoDevFiles") and (is_wsl or any(_DEVICES.glob("nvidia[0-9]*")))


def format_bytes(number: float) -> str:
    """A number of bytes with its unit: "99 GiB"."""
    power = min(int(math.log2(max(number, 1))) // 10, 4)
    return f"{number / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use without what can be freed) of each control group with a limit."""
    for folder in _cgroup_folders("memory"):
        limit, used = (
            ("memory.max", "memory.current")
            if (folder / "memory.max").exists()
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            freeable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            yield int((folder / limit).read_text()), int((folder / used).read_text()) - freeable


def _cgroup_folders(controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it, of version 1 or 2."""
    folders = []
    with suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = _CGROUPS / controller if controllers else _CGROUPS
                # In a container the path may be the host's, of which only the root is visible.
                folders += [root / part.relative_to("/") for part in (Path(path), *Path(path).parents)]
    return folders
