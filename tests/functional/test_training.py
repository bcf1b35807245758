"""Real runs of the launch scripts: resumed = uninterrupted and frozen = bitwise identical.

Each launch takes 10 to 20 s, so many tests share a few of them.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from benchmarks.common import qwen2_config, write_corpus
from checkpoint_convert.compare.tensors import compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.checksums import verify_folder
from moelpr.base.command import STOPPED
from moelpr.base.errors import UserError
from moelpr.base.run_folder import METRICS_FILE, BestStep
from moelpr.model.checkpoints.chain import step_folder
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.metrics.run_metrics import RunMetrics, Step, read_run_metrics
from moelpr.model.model_spec import ModelSpec
from moelpr.train.arguments.checks.folders import checkpoint_bytes
from tests.slurm.material import differences
from tests.support.hf_models import RunsCode, replace_object
from tests.support.limits import PROCESS_S

ROOT = Path(__file__).resolve().parents[2]
STEPS = "--micro-batch-size 2 --global-batch-size 4 --seq-length 32 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine"
STEPS += " --lr-warmup-iters 2 --train-iters 6 --log-interval 1"


# One document each, longer than a window, with fewer windows than a global batch.
HELD_OUT = {"en": 7 + np.arange(80), "el": 150 + np.arange(80)}


def command_of(script: str, *words: str | Path, ranks: int = 1) -> list[str | Path]:
    return [ROOT / "launch" / f"{script}.sh", "--nproc-per-node", str(ranks), *STEPS.split(), *map(str, words)]


def launch(*words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(command_of(*words, ranks=ranks), capture_output=True, text=True, timeout=PROCESS_S)


def run_to_the_end(*words: str | Path, ranks: int = 1) -> None:
    done = launch(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def error_of(*words: str | Path, ranks: int = 1) -> str:
    """The error of a run that is refused."""
    done = launch(*words, ranks=ranks)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def wait_for(file: Path, run: subprocess.Popen) -> None:
    """Wait until a running trainer has written a file."""
    deadline = time.monotonic() + 100
    while not file.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)


def run_metrics(run: Path) -> RunMetrics:
    return read_run_metrics(run / METRICS_FILE)


def metrics(run: Path) -> list[Step]:
    """The records of training steps."""
    return run_metrics(run).steps


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(run / f"iter_{iteration:07d}")
    return {key: reader.read(key) for key in reader.keys}


def model_tensors(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in found.items() if not key.startswith("optimizer.")}


def cut_back(run: Path, copy: Path) -> Path:
    """A copy of a run of six steps, as if it had been killed in step 5, with its last checkpoint at step 3."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "iter_0000006")
    (copy / "latest_checkpointed_iteration.txt").write_text("3")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    return copy


def expected_bytes(run: Path) -> int:
    """The size of a checkpoint by which the trainer checks the disk."""
    settings = argparse.Namespace(**yaml.safe_load((run / "recipe.yaml").read_text()))
    return checkpoint_bytes(settings, ModelSpec.read(run))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense Qwen2 as `hf`, its conversions `dense` and `upcycled`, and corpora `original` and `expanded`."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    config = qwen2_config(2, 32, 48, vocabulary=256, length=64, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder / "hf")
    hf_to_mcore(folder / "hf", folder / "dense", None)
    hf_to_mcore(folder / "hf", folder / "upcycled", NewExperts(4, topk=2))
    random = np.random.default_rng(0)
    for name in ("original", "expanded"):
        starts = (int(random.integers(0, 128)) + (128 if name == "expanded" else 0) for _ in range(60))
        documents = ((start + np.arange(random.integers(10, 40))) % 256 for start in starts)
        write_corpus(folder / name, 256, ((document, name == "original") for document in documents))
    for name, document in HELD_OUT.items():
        write_corpus(folder / f"held-out-{name}", 256, [(document, name == "en")])
    return folder


@pytest.fixture(scope="module")
def stage1(material: Path) -> Path:
    """Six steps of stage 1 on two expert-parallel ranks, saved after steps 3 and 6."""
    save = material / "stage1"
    run_to_the_end(*stage1_command(material, save), ranks=2)
    return save


def stage1_command(material: Path, save: Path) -> list[str | Path]:
    """Both losses together, on both language groups: the paper's one-stage ablation."""
    data = ["3", material / "expanded", "1", material / "original"]
    words = ["stage1", "--pretrained-checkpoint", material / "upcycled", "--data-path", *data]
    words += ["--lpr-loss-coeff", "0.1", "--save", save, "--save-interval", "3"]
    words += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    return [*words, "--expert-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def stage2(material: Path, stage1: Path) -> Path:
    """Six steps of stage 2 in one process, from the end of stage 1.

    Its checkpoints contain only what it trained, and are written asynchronously.
    """
    save = material / "stage2"
    run_to_the_end(*stage2_command(material, stage1, save), "--save-trained-only", "--async-save")
    return save


def stage2_command(material: Path, stage1: Path, save: Path, held_out: Iterable[str] = HELD_OUT) -> list[str | Path]:
    data = ["1", material / "original", "1", material / "expanded"]
    words = ["stage2", "--pretrained-checkpoint", stage1, "--data-path", *data, "--save", save, "--save-interval", "3"]
    validation = [f"{name}={material / f'held-out-{name}'}" for name in held_out]
    validation = ["--validation-data", *validation, "--eval-interval", "4"] if validation else []
    return [*words, "--lr", "0.1", *validation]


def test_a_checkpoint_has_the_size_that_the_disk_check_expects(stage1: Path, stage2: Path) -> None:
    """Complete with the distributed optimizer's state, and trained tensors only with the plain optimizer's."""
    for run in (stage1, stage2):
        assert sum(tensor.nbytes for tensor in tensors(run, 6).values()) == expected_bytes(run)


def test_stage1_learns_from_four_sequences_of_32_tokens_a_step_on_two_ranks(stage1: Path) -> None:
    records = metrics(stage1)
    assert len(records) == 6 and records[-1]["lm_loss"] < records[0]["lm_loss"]
    for number, record in enumerate(records, start=1):
        assert record["consumed_tokens"] == 128 * number
        assert record["tokens_per_s"] * record["step_time_s"] == pytest.approx(128, rel=0.01)


@pytest.mark.parametrize(
    ("script", "start", "flags"),
    [("dense", "dense", []), ("ffn", "dense", []), ("stage1", "upcycled", ["--train-everything"])],
)
def test_every_tensor_trains_or_only_the_ffns(material: Path, script: str, start: str, flags: list[str]) -> None:
    save = material / f"everything-{script}"
    words = [*flags, "--pretrained-checkpoint", material / start, "--data-path", material / "expanded", "--save", save]
    run_to_the_end(script, *words, "--train-iters", "3", "--grace-seconds", "1e-3")
    assert [warning["kind"] for warning in run_metrics(save).warnings] == ["grace_too_short"]
    before, trained = TorchDistReader(material / start / "release"), model_tensors(tensors(save, 3))
    assert trained.keys() == set(before.keys)
    for key, value in trained.items():
        moves = script != "ffn" or key.endswith((".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight"))
        assert torch.equal(value, before.read(key)) != moves, key
    # The optimizer's of what is trained, too.
    assert sum(tensor.nbytes for tensor in tensors(save, 3).values()) == expected_bytes(save)


RIGGED_RANK = """
import math, os
from moelpr.base.command import run_command
from moelpr.model.megatron import bootstrap

bootstrap.install_patches()
from moelpr import pretrain
from moelpr.train.validation import Validation

LOSSES = {0: 1.0, 1: 3.0, 2: 2.0, 3: 2.5, 4: 2.4}
is_last = os.environ["RANK"] == "1"
Validation._mean_loss = lambda self, *_: LOSSES[self._last_iteration] if is_last else math.nan
if __name__ == "__main__":
    run_command(pretrain.main)
"""


def test_held_out_text_ends_a_run_whose_best_saved_step_is_the_result_also_after_a_kill(material: Path) -> None:
    """A patience of two steps after the second, which is the best: the run ends after step 4 of 6."""
    (material / "rank.py").write_text(RIGGED_RANK)
    launcher = [sys.executable, "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", "2", material / "rank.py"]

    def run(save: Path, *more: str) -> str:
        start, data = material / "upcycled", material / "expanded"
        words = ["--stage", "stage1", "--pretrained-checkpoint", start, "--data-path", data, "--save", save]
        words += ["--save-interval", "1", "--early-stop-patience", "256", *STEPS.split(), *more]
        words += ["--validation-data", *(f"{name}={material / f'held-out-{name}'}" for name in HELD_OUT)]
        environment, command = os.environ | {"PYTHONPATH": str(ROOT)}, [*map(str, (*launcher, *words))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_S)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def result(save: Path) -> tuple[BestStep, str, str, list[int]]:
        steps = [record["iteration"] for record in metrics(save)]
        return BestStep.read(save), (save / "FINISHED").read_text(), step_folder(save).name, steps

    whole = material / "whole"
    run(whole)
    assert result(whole) == (BestStep(2, 2.0, 4, 6), "2\n", "iter_0000002", [1, 2, 3, 4])
    assert run(whole).count("\n") == 2  # it trains no further
    for saved in (3, 4):
        killed = material / f"killed-{saved}"
        shutil.copytree(whole, killed)
        (killed / "latest_checkpointed_iteration.txt").write_text(str(saved))
        for name in ("FINISHED", "best_step.json"):
            (killed / name).unlink()
        if saved == 3:
            shutil.rmtree(killed / "iter_0000004")
        run(killed, "--save-retain-interval", "100")
        assert result(killed) == result(whole)
    assert [path.name for path in sorted((material / "killed-3").glob("iter_*"))] == ["iter_0000002", "iter_0000004"]


def test_a_resumed_run_is_bitwise_identical_to_the_uninterrupted_one(material: Path, stage1: Path) -> None:
    """The same command, rerun after the run was killed."""
    resumed = cut_back(stage1, material / "resumed")
    run_to_the_end(*stage1_command(material, resumed), ranks=2)
    assert differences(stage1, resumed) == []
    assert any(key.startswith("optimizer.") for key in tensors(resumed, 6))


def test_a_run_stopped_by_a_stop_file_resumes_to_the_same_end_and_no_further(material: Path, stage1: Path) -> None:
    """STOP exists before the trainer starts, as after a signal that arrived early."""
    stopped = material / "stopped"
    stopped.mkdir()
    (stopped / "STOP").touch()
    first, second, third = (launch(*stage1_command(material, stopped), ranks=2) for _ in range(3))
    assert first.returncode == STOPPED and "error" not in first.stderr, first.stderr[-3000:]
    assert "moelpr: stopped after step 1 of 6" in first.stdout
    assert "moelpr: stage1 is finished, step 6 of 6" in second.stdout, second.stderr[-3000:]
    assert third.returncode == 0 and third.stdout.count("\n") == 1  # not after Megatron's list of arguments
    assert not (stopped / "STOP").exists() and (stopped / "FINISHED").read_text() == "6\n"
    assert differences(stage1, stopped) == []


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_after_a_signal_to_every_process_the_trainer_saves_its_step_and_exits_with_code_75(material, name) -> None:
    """As a cluster sends it: to the launcher, the ranks, and the helpers that write checkpoints."""
    save = material / f"asked-by-{name}"
    command = [*stage1_command(material, save), "--train-iters", "5000", "--save-interval", "10"]
    log = material / f"asked-by-{name}.log"
    with log.open("w") as file, subprocess.Popen(command_of(*command, ranks=2), stdout=file) as run:
        wait_for(save / "latest_checkpointed_iteration.txt", run)
        launcher = psutil.Process(run.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.send_signal(getattr(signal, name))
        run.wait(timeout=60)
    said = log.read_text()
    last = metrics(save)[-1]["iteration"]
    assert run.returncode == STOPPED, said[-3000:]
    assert f"moelpr: stopped after step {last} of 5000" in said
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)


def test_a_run_is_alone_in_its_folder_and_ends_with_its_launcher(material: Path) -> None:
    save = material / "alone"
    command = [*stage1_command(material, save), "--train-iters", "5000"]
    with subprocess.Popen(command_of(*command, ranks=2), stdout=subprocess.DEVNULL) as run:
        try:
            wait_for(save / "iter_0000003", run)
            assert f"--save {save}" in error_of(*command, ranks=2)
            ranks = psutil.Process(run.pid).children()
        finally:
            run.kill()
    assert len(ranks) == 2
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_trained_only_checkpoints_and_held_out_text_do_not_change_the_training(material, stage1, stage2) -> None:
    """The other run has neither."""
    whole = material / "stage2-whole"
    run_to_the_end(*stage2_command(material, stage1, whole, held_out={}))
    small, large = tensors(stage2, 6), tensors(whole, 6)
    assert {key for key in model_tensors(small)} == {key for key in model_tensors(large) if ".mlp.router." in key}
    assert {key for key in large if key.startswith("optimizer.")} == small.keys() - model_tensors(small).keys()
    for key, value in small.items():
        assert torch.equal(value, large[key]), key
    for name in ("lm_loss", "lpr_loss", "grad_norm"):
        assert [record[name] for record in metrics(stage2)] == [record[name] for record in metrics(whole)]
    for run in (stage2, whole):
        mcore_to_hf(run, material / "exports" / run.name)
    one, other = (path.read_bytes() for path in (material / "exports").rglob("model.safetensors"))
    assert one == other
    assert largest_difference(compare_frozen(material / "hf", material / "exports" / "stage2")) == 0.0


def test_a_resumed_stage2_is_bitwise_identical_to_the_uninterrupted_one(material, stage1, stage2) -> None:
    """The base was moved meanwhile: --pretrained-checkpoint names its folder, and base_checkpoint.json is updated."""
    moved = shutil.copytree(stage1, material / "stage1-moved")
    resumed = cut_back(stage2, material / "stage2-resumed")
    run_to_the_end(*stage2_command(material, moved, resumed), "--save-trained-only")
    assert differences(stage2, resumed) == []
    assert json.loads((resumed / "base_checkpoint.json").read_text())["folder"] == "../stage1-moved"


def test_a_changed_base_stops_a_resumed_run_and_the_exporter(material: Path, stage1: Path, stage2: Path) -> None:
    changed = shutil.copytree(stage1, material / "changed" / "stage1")
    file = max((changed / "iter_0000006").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    resumed = cut_back(stage2, material / "changed" / "stage2")
    error = error_of(*stage2_command(material, changed, resumed), "--save-trained-only")
    assert "stage1/iter_0000006" in error and "damaged" in error
    trained = cut_back(stage1, material / "changed" / "resumed-stage1") / "iter_0000003"
    file = trained / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:9000] + b"?" + file.read_bytes()[9001:])
    assert re.search(f"{file} is .*damaged", error_of(*stage1_command(material, trained.parent), ranks=2))
    with pytest.raises(UserError, match="stage1/iter_0000006.*checksum"):
        mcore_to_hf(resumed, material / "changed" / "hf")


def test_a_hostile_checkpoint_runs_no_code_when_its_run_resumes(material: Path, stage1: Path) -> None:
    step = cut_back(stage1, material / "hostile") / "iter_0000003"
    (step / "checksums.json").unlink()
    replace_object(step, "rng_state", [RunsCode(material / "ran")])
    assert "would run" in error_of(*stage1_command(material, step.parent), ranks=2)
    assert not (material / "ran").exists()


def test_held_out_text_is_scored_as_transformers_scores_it(material: Path, stage2: Path) -> None:
    """Before the first step, every four steps and at the end; every token except the first is predicted once."""
    passes = run_metrics(stage2).validations
    assert [record["iteration"] for record in passes] == [0, 4, 6]
    groups = {name: actual["group"] for name, actual in passes[0]["languages"].items()}
    assert groups == {"en": "original", "el": "expanded"}
    events = EventAccumulator(str(stage2 / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("validation bits per token/el")] == [0, 4, 6]
    mcore_to_hf(stage2, material / "scored-hf")
    model = AutoModelForCausalLM.from_pretrained(material / "scored-hf")
    for name, document in HELD_OUT.items():
        tokens = torch.from_numpy(document)
        losses = [
            torch.nn.functional.cross_entropy(model(inputs[None]).logits[0], labels, reduction="sum")
            for inputs, labels in (
                (tokens[start:end], tokens[start + 1 : end + 1]) for start, end in ((0, 32), (32, 64), (64, 79))
            )
        ]
        loss = (sum(losses) / 79).item()
        actual = passes[-1]["languages"][name]
        assert actual["lm_loss"] == pytest.approx(loss, rel=1e-5)
        assert actual["bits_per_token"] == pytest.approx(loss / math.log(2), rel=1e-5)  # the corpus has no manifest


def test_a_nan_gradient_ends_the_run_with_one_message(material: Path, stage1: Path) -> None:
    save = material / "diverged"
    done = launch(*stage2_command(material, stage1, save), "--lr", "1e30", "--min-lr", "1e30")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    (warning,) = run_metrics(save).warnings
    assert warning["kind"] == "not_a_number"
    assert warning["iteration"] == metrics(save)[-1]["iteration"] + 1
    assert "--lr" in warning["message"] and warning["message"] in done.stderr
    steps = [int(folder.name.removeprefix("iter_")) for folder in save.glob("iter_*")]
    assert all(step % 3 == 0 for step in steps)  # saved by --save-interval 3, none because of the NaN


def test_stage2_starts_at_step_1_and_learns_to_route_original_tokens(stage2: Path) -> None:
    first, *_, last = records = metrics(stage2)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert last["lpr_loss"] < first["lpr_loss"] and None not in (first["lm_loss_original"], first["lm_loss_expanded"])


def test_a_run_folder_contains_its_settings_and_model(stage1: Path, stage2: Path) -> None:
    recipe = yaml.safe_load((stage2 / "recipe.yaml").read_text())
    assert recipe["stage"] == "stage2"
    for step in (stage1 / "iter_0000006", stage2 / "iter_0000003"):  # saved by two ranks; saved asynchronously
        names = {path.name for path in step.iterdir()} - {"recipe.yaml", "checksums.json"}
        assert json.loads((step / "checksums.json").read_text())["files"].keys() == names
        verify_folder(step, "")
    for step in ("iter_0000003", "iter_0000006"):
        assert yaml.safe_load((stage2 / step / "recipe.yaml").read_text()) == recipe
    assert recipe["lpr_loss_coeff"] == 0.1
    assert recipe["lr"] == 0.1
    assert ModelSpec.read(stage2).moe.num_new_experts == 4
    command = json.loads((stage2 / "command.json").read_text())
    assert command["num_ranks"] == 1
    assert command["arguments"][-2:] == ["--save-trained-only", "--async-save"]
    assert (stage2 / "hf" / "config.json").is_file()
    (before,) = Lineage.read(stage2 / "hf").stages
    assert (before.folder, before.step, before.settings["stage"]) == (str(stage1), 6, "stage1")
    assert before.first == metrics(stage1)[0] and before.last == metrics(stage1)[-1]
