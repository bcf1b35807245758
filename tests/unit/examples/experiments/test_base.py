"""The base of the experiments."""

import importlib.util
from pathlib import Path

import pytest

from examples.experiments.base import write_base
from moelpr.base.errors import UserError


def test_a_missing_gguf_reader_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gguf is not installed"):
        write_base(tmp_path / "base-hf", tmp_path / "downloads")
    assert not any(tmp_path.iterdir())
