"""Commands and ranks of the benchmarks."""

import ast
from pathlib import Path

import pytest

from benchmarks.common import ROOT, run_ranks

PROGRAMS = [path for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_docstring_contains_the_command(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    commands = [line for line in docstring.splitlines() if line.startswith("    ") and "python" in line]
    assert any(f"-m {module}" in line or f"python {path.relative_to(ROOT)}" in line for line in commands)


def test_failed_ranks_end_the_benchmark_with_the_end_of_their_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="(?s)trial failed.*No module named.*missing_module"):
        run_ranks(1, "benchmarks.missing_module", log=tmp_path / "trial.log", timeout_s=100)
