"""The tiny models that these tests share, and checkpoints and exports of them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import hf_to_mcore
from moelpr.errors import run_command
from tests.hf_models import held_bytes, make_model, make_qwen2, qwen2, source  # noqa: F401


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call a command's `main` with arguments as its script does, and return the exit code."""

    def call(main: Callable[[], None], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            run_command(main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:  # noqa: F811
    """bf16, with a tokenizer and a model card; a test may change it."""
    folder = Path(shutil.copytree(make_qwen2(torch.bfloat16, tokenizer=True), tmp_path / "Base-1B"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    return folder


@pytest.fixture
def upcycled(qwen2: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A checkpoint of qwen2 with 4 new experts in every layer."""
    hf_to_mcore(qwen2, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def export(qwen2: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The export of the checkpoint tmp_path/megatron: qwen2 with 4 new experts in layers 0 and 3."""
    hf_to_mcore(qwen2, tmp_path / "megatron", moe_layers=[0, 3])
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """JSON lines of letters that the tests' tokenizer has tokens for."""
    lines = ["ab" * 40 + "aaab" * 20, "b" + "a" * 30 + "bbab"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "text.jsonl"
