"""`moelpr run` with method ffn and lora: two projects that share their text, and what each of them trains."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moelpr.base.yaml_files import dump, read_mapping
from tests.support.hf_models import load_stock
from tests.support.tiny_project import write_project

METHODS = ("ffn", "lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all methods, in folders named like them."""
    folder = tmp_path_factory.mktemp("methods")
    content = read_mapping(write_project(folder, steps=4), "project")
    for key in ("experts", "replay"):
        del content[key]
    batch, evaluate = content["steps"]["stage1"], content["steps"]["evaluate"]
    for method in METHODS:
        own: dict[str, Any] = {
            name: value for name, value in batch.items() if method != "lora" or name != "log-interval"
        }
        content |= {"method": method, "output": method, "text_output": "text", "mix": {"replay": 0.25}}
        content["steps"] = {"preprocess": {"workers": 1}, method: own | {"lr": 1e-3}, "evaluate": evaluate}
        (folder / f"{method}.yaml").write_text(dump(content))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_tensors_on_the_text_that_another_project_has_tokenized(folder: Path, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    before = {path.name: path.read_text() for path in (folder / "text" / "logs").glob("*.json")}
    command = [sys.executable, "-m", "moelpr", "run", f"{method}.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = {path.name: path.read_text() for path in (folder / "text" / "logs").glob("*.json")}
    assert {*after} == {f"preprocess-{code}.json" for code in ("el", "hu", "en", "es")}
    assert before in ({}, after) and done.stdout.count("already done") == len(before)

    start = load_stock(folder / "base", "Qwen2ForCausalLM").state_dict()
    trained = load_stock(folder / method / "hf", "Qwen2ForCausalLM").state_dict()
    assert trained.keys() == start.keys()
    moves = {"ffn": ".mlp.", "lora": "_proj.weight"}[method]
    for name, tensor in start.items():
        assert torch.equal(trained[name], tensor) != (moves in name), name

    results = json.loads((folder / method / "evaluation" / "results.json").read_text())
    assert {*json.dumps(results).split('"')} >= {"base", method, "el", "en"}
    steps = [json.loads(line) for line in (folder / method / method / "metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in steps if "lm_loss" in step] == [1, 2, 3, 4]
    assert "model-index" in (folder / method / "hf" / "README.md").read_text()
    assert (folder / method / "report.html").is_file() and not (folder / method / "data").exists()
