"""A pipeline in MLflow's file store and in Weights & Biases offline: every step once, over a kill and two stages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.test_training import STEPS, material, metrics, stage1_command, stage2_command

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "WANDB_API_KEY": "a" * 39 + "9",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/with+signs",
    "HF_TOKEN": "hf_planted",
    "LICENSE_HOST": "host-of-the-site.example",
    "REGISTRY_URL": "https://user:pass-planted@registry-of-the-site.example/x",
}
PRIVATE = ["a" * 39 + "9", "s3cr3t/with+signs", "hf_planted", "of-the-site", "pass-planted"]
assert material


@pytest.fixture(scope="module")
def run(material: Path) -> Path:
    """Stage 1, killed in mid-training and resumed, then stage 2, then results and a picture."""
    folder = material / "tracked"
    folder.mkdir()
    flags = ["--tracker-run", folder / "tracker.json", "--wandb-project", "p", "--mlflow-experiment", "greek"]
    stage1, stage2 = material / "tracked/stage1", material / "tracked/stage2"
    one = [*stage1_command(material, stage1), *flags]
    one = one[: one.index("--use-distributed-optimizer")] + flags  # one rank
    killed = start(folder, one)
    while not (stage1 / "metrics.jsonl").exists() or len(metrics(stage1)) < 5:
        time.sleep(0.05)
        assert killed.poll() is None, (folder / "output").read_text()[-3000:]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for words in (one, [*stage2_command(material, stage1, stage2), *flags]):
        done = start(folder, words)
        done.wait(timeout=200)
        output = (folder / "output").read_text()
        assert done.returncode == 0, output[-3000:]
        assert "warning: " not in output.replace("moelpr: warning: stage", "")
    (folder / "results.json").write_text(json.dumps({"models": {"base": {"el": {"bits_per_byte": {"value": 1.5}}}}}))
    (folder / "change.svg").write_text("<svg>s3cr3t/with+signs https://me:pass-planted@x.example/</svg>")
    words = ["--results", folder / "results.json", "--files", folder / "change.svg"]
    for _ in range(2):  # nothing is sent twice
        command = [sys.executable, "-m", "moelpr", "track", stage1, stage2, *words, *flags]
        subprocess.run(command, cwd=ROOT, env=environment(folder), check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    store = {"MLFLOW_TRACKING_URI": f"file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    own = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1", "MOELPR_PYTHON": sys.executable}
    return {**os.environ, **SECRETS, **store, **own}


def start(folder: Path, words: list) -> subprocess.Popen:
    command = [ROOT / "launch" / f"{words[0]}.sh", *STEPS.split(), *map(str, words[1:])]
    with (folder / "output").open("w") as file:
        return subprocess.Popen(
            command, env=environment(folder), start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )


def expected(run: Path) -> list[tuple[int, float]]:
    """Steps of the whole run and losses, by the run folders."""
    records = [metrics(run / stage) for stage in ("stage1", "stage2")]
    return [(6 * place + one["iteration"], one["lm_loss"]) for place, actual in enumerate(records) for one in actual]


def test_mlflow_has_every_step_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{run}/mlruns")
    (actual,) = client.search_runs([client.get_experiment_by_name("greek").experiment_id])

    def history(key: str) -> list[tuple[int, float]]:
        return [(one.step, one.value) for one in client.get_metric_history(actual.info.run_id, key)]

    assert history("lm loss") == expected(run)
    assert [step for step, _ in history("validation bits per token/el")] == [6, 10, 12]
    assert [step for step, _ in history("stage2/step")] == [7, 8, 9, 10, 11, 12]
    assert history("results/base/el/bits_per_byte") == [(13, 1.5), (14, 1.5)]  # the last one counts
    assert actual.info.status == "FINISHED" and actual.data.params["stage1.lr"] == "0.01"
    assert [file.path for file in client.list_artifacts(actual.info.run_id)] == ["change.svg"]


def test_wandb_has_every_step_once(run: Path) -> None:
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 1, "one folder to sync, which has all"
    picture = folders[0] / "files" / "change.svg"
    assert picture.is_file() and not picture.is_symlink()
    records = list(wandb_records(next(folders[0].glob("*.wandb"))))
    history = [one.history for one in records if one.WhichOneof("record_type") == "history"]
    rows = [
        (row.step.num, {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in row.item})
        for row in history
    ]
    losses = [(step, json.loads(values["lm loss"])) for step, values in rows if "lm loss" in values]
    assert losses == expected(run)
    assert max(Counter(step for step, _ in rows).values()) == 1
    assert [step for step, values in rows if "validation bits per token/el" in values] == [6, 10, 12]


def wandb_records(path: Path) -> Iterator:
    """The records of a file in the format of LevelDB's logs: blocks of 32 KiB, records in one or several parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def test_neither_store_has_credentials_or_hosts(run: Path) -> None:
    files = [path for store in ("mlruns", "wandb") for path in (run / store).rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        actual = [word for word in PRIVATE if word.encode() in path.read_bytes()]
        assert not actual, f"{path} has {actual}"
