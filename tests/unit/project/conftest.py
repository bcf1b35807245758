"""A project whose base is a shape and a tokenizer, and whose text is a few lines: enough to plan, not to train."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moelpr.base import machine
from moelpr.base.yaml_files import dump
from moelpr.measure.report.findings import Findings, Point, TextResult
from tests.support.hf_models import make_model, make_qwen2, qwen2  # noqa: F401
from tests.support.model_shapes import save_config

Write = Callable[..., Path]


def write_findings(distance: float, kept: float, change: float = 0.0) -> None:
    """Write what the routers of a second FFN do."""
    ends = {"base": Point(0, 3.0), "learned": Point(0.5, 2.0), "result": Point(distance, 3.0 - kept)}
    texts = {
        "el": TextResult([0.1, 0.9], 0.1, losses=(3.0, 2.0, 2.1)),
        "en": TextResult([1.0], 1.0, distance, None, change),
    }
    findings = Findings(**ends, kept=kept, tried=[], shares=[], texts=texts, max_distance=None, keep=None)
    Path("out/hf").mkdir(parents=True, exist_ok=True)
    Path("out/hf/calibration.json").write_text(json.dumps({"findings": asdict(findings)}))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a languages.yaml in an empty current folder, whose keys the arguments replace (None removes one)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 40)  # enough for any training on its CPU
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    save_config("Qwen1.5-1.8B", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").touch()
    for code in ("el", "hu", "en", "es"):
        (tmp_path / f"{code}.jsonl").write_text(100 * (json.dumps({"text": f"{code} text " * 20}) + "\n"))

    def write(**changes: Any) -> Path:
        content = {
            "model": "base",
            "output": "out",
            "languages": {"expanded": {"el": "el.jsonl", "hu": "hu.jsonl"}, "original": {"en": "en.jsonl"}},
            "budget": {"epochs": 1},
            "method": "moe-lpr",
            "experts": {"new": 2},
        }
        path = tmp_path / "languages.yaml"
        path.write_text(dump({key: value for key, value in (content | changes).items() if value is not None}))
        return path

    return write
