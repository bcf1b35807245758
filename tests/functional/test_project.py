"""`moelpr run` goes from FineWeb-2's files to an evaluated model, is stopped on the way, and resumes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.hf_models import load_stock
from tests.support.tiny_project import write_project

MOELPR = [sys.executable, "-m", "moelpr"]


def moelpr(folder: Path, command: str) -> str:
    done = subprocess.run([*MOELPR, command, "languages.yaml"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(900)  # on a free machine it takes a tenth of that
def test_a_project_runs_from_text_to_model_over_a_stop(tmp_path: Path) -> None:
    write_project(tmp_path, is_for_chat=True)
    assert "Stage 1 reads 6.14K tokens (tokens are estimated)" in moelpr(tmp_path, "plan")
    metrics = tmp_path / "out" / "stage1" / "metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen([*MOELPR, "run", "languages.yaml"], cwd=tmp_path, stdout=log, stderr=log)
        while run.poll() is None and not (metrics.is_file() and '"iteration": 1' in metrics.read_text()):
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
    assert run.wait() == 75, (tmp_path / "log").read_text()[-2000:]
    assert "step" in moelpr(tmp_path, "status").split("stage1")[1].splitlines()[0]

    output = moelpr(tmp_path, "run")
    assert "replay: already done" in output and "report: out/report.html" in output
    number = len(list((tmp_path / "out/logs").glob("*.json")))
    assert moelpr(tmp_path, "run").count("already done") == number
    status = moelpr(tmp_path, "status")
    assert len(re.findall(r"^\S+ +done ", status, re.MULTILINE)) == number and "learned: Greek" in status

    manifest = json.loads((tmp_path / "out/data/el_text_document.manifest.json").read_text())
    assert [source["path"].split("/", 2)[2] for source in manifest["sources"]] == ["ell_Grek/train/000_00000.parquet"]
    assert manifest["languages"].keys() == {"el"}
    results = json.loads((tmp_path / "out/evaluation/results.json").read_text())
    assert {*json.dumps(results).split('"')} >= {"base", "moe-lpr", "el", "en"}
    chat = load_stock(tmp_path / "out" / "chat", "Qwen2MoeForCausalLM")
    assert chat.config.vocab_size == 541 and "user" in (tmp_path / "out/chat/chat_template.jinja").read_text()
    assert "--load out/sft " in (tmp_path / "out/logs/export.json").read_text()
    model = load_stock(tmp_path / "out" / "hf", "Qwen2MoeForCausalLM")
    assert model.config.num_experts == 4 and "model-index" in (tmp_path / "out/hf/README.md").read_text()
