"""Results are kept in the folder of the evaluation (that a rerun uses them: test_compare.py and test_harness.py)."""

from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.result_cache import ResultCache


def test_an_output_that_cannot_be_written_is_reported_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "b", Path("/proc/b")):
        with pytest.raises(UserError, match=f"{folder}"):
            ResultCache(folder)
