"""One temporary Slurm for all tests in this folder."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs, throwaway_cluster
from tests.slurm.material import ROOT


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed; `make test-slurm` installs Debian's packages")
    if os.getuid() != 0:
        pytest.skip("slurmd requires root")
    os.chdir(ROOT)
    with throwaway_cluster() as running:
        yield running
