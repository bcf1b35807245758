"""`moelpr run` with one choice of experts: projects that share their text, and what each trains and combines."""

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

# Way → the training and its experts.
WAYS = {
    "second-ffn": ("ffn", {"topk": 1}),
    "low-rank-ffn": ("lora", {"topk": 1, "rank": 4}),
    "per-language": ("ffn", {"topk": 1, "per_language": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all ways, in folders named like them."""
    folder = tmp_path_factory.mktemp("ways")
    content = read_mapping(write_project(folder, steps=4), "project")
    del content["replay"]
    batch, evaluate, routing = (content["steps"][step] for step in ("stage1", "evaluate", "routing"))
    for way, (training, experts) in WAYS.items():
        own: dict[str, Any] = {
            name: value for name, value in batch.items() if training != "lora" or name != "log-interval"
        }
        content |= {"experts": experts, "output": way, "text_output": "text", "mix": {"replay": 0.25}}
        content["steps"] = {"preprocess": {"workers": 1}, training: own | {"lr": 1e-3}, "evaluate": evaluate}
        content["steps"] |= {"routing": routing, "combine": {"max-tokens": 400}}
        (folder / f"{way}.yaml").write_text(dump(content))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_ffns_train_on_text_that_another_project_has_tokenized_and_join_the_base(folder: Path, way: str) -> None:
    training, _ = WAYS[way]
    if training == "lora":
        pytest.importorskip("peft")
    before = {path.name: path.read_text() for path in (folder / "text" / "logs").glob("*.json")}
    command = [sys.executable, "-m", "moelpr", "run", f"{way}.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = {path.name: path.read_text() for path in (folder / "text" / "logs").glob("*.json")}
    assert {*after} == {f"preprocess-{code}.json" for code in ("el", "hu", "en", "es")}
    assert before in ({}, after) and done.stdout.count("already done") == len(before)
    start = load_stock(folder / "base", "Qwen2ForCausalLM").state_dict()
    parts = ["-el", "-hu"] if way == "per-language" else [""]
    experts = [load_stock(folder / way / "ffn-hf" / part[1:], "Qwen2ForCausalLM").state_dict() for part in parts]
    for trained in experts:
        assert trained.keys() == start.keys()
        for name, tensor in start.items():
            assert torch.equal(trained[name], tensor) != (".mlp." in name), name
    model = load_stock(folder / way / "hf", "Qwen2MoeForCausalLM")
    numbers = model.config.num_experts, model.config.num_experts_per_tok, model.config.norm_topk_prob
    assert numbers == (1 + len(parts), 1, True)
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            layer, _, kind = name.partition(".experts.")
            matrices = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for expert, dense in enumerate((start, *experts)):
                assert torch.equal(tensor[expert], torch.cat([dense[f"{layer}.{one}.weight"] for one in matrices])), (
                    name
                )
        elif name in start:
            assert torch.equal(tensor, start[name]), name
        else:
            assert ".mlp.gate." in name or "shared_expert" in name

    results = json.loads((folder / way / "evaluation" / "results.json").read_text())
    method = "low-rank-ffn" if training == "lora" else "second-ffn"
    assert {*json.dumps(results).split('"')} >= {"base", method, "el", "en"}
    for part in parts:
        metrics = (folder / way / f"{training}{part}" / "metrics.jsonl").read_text()
        steps = [json.loads(line) for line in metrics.splitlines()]
        assert [step["iteration"] for step in steps if "lm_loss" in step] == [1, 2, 3, 4]
    assert [*json.loads((folder / way / "hf" / "calibration.json").read_text())["experts"].values()] == (
        [["el"], ["hu"]] if len(parts) == 2 else [["el", "hu"]]
    )
    assert "model-index" in (folder / way / "hf" / "README.md").read_text()
    assert (folder / way / "report.html").is_file() and not (folder / way / "data").exists()
