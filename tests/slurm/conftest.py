"""One temporary Slurm for all tests in this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.material import ROOT


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make test-slurm` installs Debian's packages")
    if os.getuid() != 0:
        pytest.skip("slurmd requires root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    os.chdir(ROOT)
    try:
        with Cluster(folder / "cluster") as running:
            # Each rank uses one thread and no network.
            running.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
