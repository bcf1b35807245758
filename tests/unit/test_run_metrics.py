"""metrics.jsonl is read while it is written, and after a run was resumed."""

import json
from pathlib import Path

import pytest

from moelpr.errors import UserError
from moelpr.run_metrics import read_metrics


def test_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1, "lm_loss": 3.5}\n{"iteration": 2, "lm_loss": 3.0}\n{"iteration": 3, "lm_l')
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]


def test_malformed_line_and_missing_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2, "no\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_step_repeated_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5)]
    path.write_text("".join(json.dumps({"iteration": step, "lm_loss": loss}) + "\n" for step, loss in records))
    assert [(record["iteration"], record["lm_loss"]) for record in read_metrics(path)] == [(1, 3.0), (2, 2.5), (3, 1.5)]
