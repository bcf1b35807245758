"""`moelpr demo` needs nothing but the package, and ends with a verdict."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hf_models import load_stock


@pytest.mark.timeout(900)  # on a free machine it takes a tenth of that
def test_the_demo_learns_two_languages_and_keeps_two(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def moelpr(*words: str | Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "moelpr", *words]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True)

    done = moelpr("demo", "--output", "toy")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Worth serving" in done.stdout
    [model] = re.findall(r"^model: (.*)$", done.stdout, re.MULTILINE)
    assert load_stock(tmp_path / model, "Qwen2MoeForCausalLM").config.num_experts_per_tok in (1, 2)
    again = moelpr("demo", "--output", "toy")
    assert again.returncode == 0 and "Worth serving" in again.stdout
    assert again.stdout.count("already done") == len(list((tmp_path / "toy/out/logs").glob("*.json")))
    # Text that has been read may be removed, until something is to be done again with it.
    (tmp_path / "toy/el.jsonl").unlink()
    file = tmp_path / "toy/languages.yaml"
    shown, dry = moelpr("status", file), moelpr("run", file, "--dry-run")
    task = moelpr("run", file, "--task", "combine")
    assert shown.returncode == task.returncode == dry.returncode == 0, shown.stderr + task.stderr + dry.stderr
    assert "Worth serving" in shown.stdout and "combine: already done" in task.stdout
    (tmp_path / "toy/out/logs/combine.json").unlink()
    shown, gone = moelpr("status", file), moelpr("run", file)
    assert shown.returncode == 0 and "combine        to do" in shown.stdout
    assert gone.returncode == 2 and "languages.expanded.el: there is no file toy/el.jsonl" in gone.stderr
