"""Settings of all tests, made before torch is imported, and inherited by the processes that tests start."""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Seconds that each test file took, with its fixtures, by the last `make test-all PYTEST=--store-durations`.
DURATIONS = Path(__file__).parent / "durations.json"

# Spinning threads make several ranks on two cores crawl.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
# A test that needs the network is a mistake: let it fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples in every run: what is found by chance is looked for in `make test-faults`.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


class StoreDurations:
    """Writes durations.json at the end of a session."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        rounded = {file: round(seconds) for file, seconds in sorted(self._seconds.items())}
        DURATIONS.write_text(json.dumps(rounded, indent=0) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help=f"write the seconds of each file to {DURATIONS}")


def pytest_configure(config: pytest.Config) -> None:
    """Only the tests in tests/gpu use GPUs; the others compare CPU ranks."""
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(StoreDurations())
    if not any("gpu" in Path(argument).parts for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, new ones before them; skip tests of GPUs where there are none."""
    seconds = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], float("inf")))
    if gpu_tests := [item for item in items if item.get_closest_marker("gpu")]:
        import torch  # takes seconds, so only where it is needed

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which a program takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
