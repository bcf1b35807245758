"""Saved steps are scored on benchmarks while the run goes on, as an export of them is afterwards."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.functional.test_training import records
from tests.support.limits import PROCESS_S
from tests.unit.evaluate.conftest import dense_dir, tokenizer
from tests.unit.evaluate.test_harness import local_tasks

assert dense_dir and tokenizer and local_tasks
ROOT = Path(__file__).resolve().parents[2]
STEPS = "--micro-batch-size 1 --global-batch-size 2 --seq-length 16 --lr 1e-2 --train-iters 4 --log-interval 1"


def train(save: Path, upcycled: Path, corpus: Path, *words: str | Path) -> subprocess.CompletedProcess:
    flags = ["--pretrained-checkpoint", upcycled, "--data-path", corpus, "--save", save, "--save-interval", "1", *words]
    command = [ROOT / "launch" / "stage1.sh", *STEPS.split(), *map(str, flags)]
    environment = {**os.environ, "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "MOELPR_PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_S)


@pytest.fixture
def material(tmp_path: Path, dense_dir: Path, tokenizer) -> Path:
    from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
    from data_tools.corpus.corpus_writer import CorpusWriter
    from moelpr.families.new_experts import NewExperts

    hf_to_mcore(dense_dir, tmp_path / "upcycled", NewExperts(2, topk=2))
    with CorpusWriter(tmp_path / "corpus", vocab_size=len(tokenizer)) as writer:
        for _ in range(20):
            writer.add_document(np.arange(30) % len(tokenizer), False)
        writer.finalize()
        writer.commit()
    return tmp_path


@pytest.mark.skipif(not (find_spec("lm_eval") and find_spec("accelerate")), reason="needs lm-evaluation-harness")
def test_probes_have_the_scores_of_exports(material: Path, local_tasks: Path) -> None:
    save, tasks = material / "run", [material / "table.yaml", local_tasks]
    done = train(save, material / "upcycled", material / "corpus", "--probe-tasks", *tasks, "--probe-interval", "2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    probes = [record for record in records(save) if record.get("event") == "probe"]
    assert [probe["step"] for probe in probes] == [2, 4], done.stderr[-3000:]
    assert [record["iteration"] for record in records(save)] == sorted(record["iteration"] for record in records(save))
    assert probes[0]["waited_s"] > 0, "a training on CPUs waits, and says for how long"
    assert "stage1 step 4, probe: Doors/" in done.stderr and "for which training waited" in done.stderr
    export = [
        sys.executable,
        "-m",
        "moelpr",
        "model",
        "export",
        "--load",
        save,
        "--iteration",
        "4",
        "--save",
        material / "hf",
    ]
    harness = [
        sys.executable,
        "-m",
        "moelpr",
        "evaluate",
        "harness",
        "--model",
        f"x={material / 'hf'}",
        "--tasks",
        tasks[0],
    ]
    harness += [
        "--include-path",
        tasks[1],
        "--languages",
        "en,el",
        "--original-languages",
        "en",
        "--output",
        material / "out",
    ]
    for command in (export, harness):
        subprocess.run([*map(str, command)], check=True, cwd=ROOT, capture_output=True)
    scores = json.loads((material / "out" / "harness.json").read_text())["models"]["x"]["scores"]["Doors"]
    assert probes[1]["scores"] == {f"Doors/{code}": round(one["value"], 2) for code, one in scores.items()}
    left = sorted(str(path.relative_to(material)) for path in material.glob("run-probes/*/*"))
    assert left == ["run-probes/2/results", "run-probes/4/results"], "exports are removed"


def test_probes_without_the_harness_are_one_sentence(material: Path, local_tasks: Path) -> None:
    if find_spec("lm_eval"):
        pytest.skip("lm-evaluation-harness is installed")
    done = train(material / "run", material / "upcycled", material / "corpus", "--probe-tasks", material / "table.yaml")
    assert done.returncode == 2 and "--probe-tasks needs lm-evaluation-harness" in done.stderr
    assert not (material / "run" / "metrics.jsonl").exists()
