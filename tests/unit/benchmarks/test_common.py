from pathlib import Path

import pytest

from benchmarks.common import run_ranks


def test_failed_ranks_end_the_benchmark_with_the_end_of_their_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="(?s)trial failed.*No module named.*missing_module"):
        run_ranks(1, "benchmarks.missing_module", log=tmp_path / "trial.log", timeout_s=100)
