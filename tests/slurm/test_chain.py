"""The chain on a real Slurm: it stops at a failed step, resumes from there, and equals plain launches."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.material import MODEL_FLAGS, ROOT, TRAINING_FLAGS, differences, make_model, make_text

pytestmark = pytest.mark.slurm

STEPS = ["--train-iters", "6", "--global-batch-size", "4"]


class Chain:
    """submit.sh with all arguments for a tiny model."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.run = cluster, folder / "run"
        self.hf = make_model(folder)
        text = make_text(folder)
        replay = folder / "replay.jsonl"
        replay.write_text("".join(path.read_text() for path in text.values()))
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.hf), "--append-eod"]
        tokenizer += ["--workers", "1"]
        self.expanded = ["--input", str(text["el"]), str(text["hu"]), "--language", "expanded", *tokenizer]
        self.replay = ["--input", str(replay), "--language-key", "lang", "--original-languages", "en", *tokenizer]
        self.evaluation = ["--model", f"base={self.hf}", "--max-documents", "5"]
        self.evaluation += [word for name, path in text.items() for word in ("--data", f"{name}={path}")]

    def submit(self, *stage2: str) -> dict[str, str]:
        """Step → the line that submit.sh prints about it."""
        steps = [
            *("@expanded", "--shards", "3", "--", *self.expanded),
            *("@replay", "--", *self.replay),
            *("@convert", "--", "--hf-path", str(self.hf), *MODEL_FLAGS),
            *("@stage1", "--nodes", "2", "--", *TRAINING_FLAGS, *STEPS),
            *("@stage2", "--nodes", "2", "--", *TRAINING_FLAGS, *STEPS, *stage2),
            "@export",
            *("@evaluate", "--", *self.evaluation),
        ]
        command = ["launch/slurm/submit.sh", "--run", str(self.run), "--partition", "low", "--time", "10", *steps]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return dict(line.split(": ", 1) for line in done.stdout.splitlines())

    def wait(self, output: dict[str, str]) -> dict[str, str]:
        """Step → the final state of its job."""
        jobs = {step: line.split()[1].strip(",") for step, line in output.items() if line.startswith("job")}
        return {step: self.cluster.wait(job, timeout_s=150) for step, job in jobs.items()}

    def log(self, step: str) -> str:
        return "\n".join(path.read_text() for path in (self.run / "slurm").glob(f"run-{step}-*.log"))


@pytest.fixture(scope="module")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(cluster, tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def broken(chain: Chain) -> dict[str, str]:
    """The final states of the first submission, whose stage 2 has a wrong flag."""
    return chain.wait(chain.submit("--nonsense"))


@pytest.fixture(scope="module")
def resumed(chain: Chain, broken: dict[str, str]) -> dict[str, str]:
    """The output of a second, correct call of submit.sh; its jobs have ended."""
    output = chain.submit()
    again = chain.submit()
    assert again["stage2"].endswith("is pending or running"), again
    states = chain.wait(output)
    assert set(states.values()) == {"COMPLETED"}, (states, chain.log("stage2")[-3000:])
    return output


def test_a_failing_stage_cancels_only_the_steps_that_depend_on_it(chain: Chain, broken: dict[str, str]) -> None:
    ended = {"stage2": "FAILED", "export": "CANCELLED", "evaluate": "CANCELLED"}
    before = dict.fromkeys(("expanded-shards", "expanded", "replay", "convert", "stage1"), "COMPLETED")
    assert broken == before | ended, chain.log("stage1")[-3000:]
    assert "--nonsense" in chain.log("stage2")


def test_a_broken_chain_resumes_at_the_failed_step(chain: Chain, resumed: dict[str, str]) -> None:
    done = {step for step, line in resumed.items() if line == "done"}
    assert done == {"expanded", "replay", "convert", "stage1"}
    assert re.fullmatch(r"job \d+", resumed["stage2"])
    report = json.loads((chain.run / "evaluation/results.json").read_text())
    assert list(report["models"]) == ["base", "stage2"]  # changes are relative to the first
    assert chain.submit() == dict.fromkeys(
        ("expanded", "replay", "convert", "stage1", "stage2", "export", "evaluate"), "done"
    )


def test_an_array_of_preprocessing_jobs_equals_one_job(chain: Chain, broken: dict[str, str]) -> None:
    from data_tools import preprocess_data

    one = chain.run.parent / "one"
    preprocess_data.main([*chain.expanded, "--output-prefix", str(one)])
    for end in ("bin", "idx", "lang"):
        merged = chain.run / "data" / f"expanded_text_document.{end}"
        assert merged.read_bytes() == Path(f"{one}_text_document.{end}").read_bytes()
    assert not list((chain.run / "data").glob("*.shard-*"))


def test_a_stage_on_two_nodes_equals_one_node_with_two_ranks(chain: Chain, broken: dict[str, str]) -> None:
    one = chain.run.parent / "one-node"
    arguments = ["--pretrained-checkpoint", chain.run / "upcycled", "--save", one]
    arguments += ["--data-path", chain.run / "data" / "expanded_text_document", *TRAINING_FLAGS, *STEPS]
    environment = {**os.environ, "NPROC_PER_NODE": "2"}
    done = subprocess.run(
        [ROOT / "launch/stage1.sh", *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(one, chain.run / "stage1") == []


def test_a_finished_stage_does_nothing_when_submitted_again(chain: Chain, broken: dict[str, str]) -> None:
    before = shutil.copytree(chain.run / "stage1", chain.run.parent / "before")
    arguments = ["--pretrained-checkpoint", chain.run / "upcycled", "--save", chain.run / "stage1"]
    arguments += [*TRAINING_FLAGS, *STEPS]
    log = chain.run.parent / "again.log"
    job = chain.cluster.submit(
        *("--nodes", 2, "--output", log, "launch/slurm/stage.sbatch", "stage1", *arguments),
        *("--data-path", chain.run / "data" / "expanded_text_document"),
    )
    assert chain.cluster.wait(job) == "COMPLETED", log.read_text()
    assert "moelpr: stage1 is finished, step 6 of 6" in log.read_text()
    assert differences(before, chain.run / "stage1") == []
