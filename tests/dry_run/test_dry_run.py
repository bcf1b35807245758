"""The trainer as ranks of clusters, on fake tensors: it starts, steps and agrees with the planner in every case."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.training import check_words
from moelpr.train.check.meter import attention_flops
from tests.dry_run.cases import MODELS, REAL, SUITE
from tests.support.limits import PROCESS_S
from tests.support.tiny_project import write_project

ROOT = Path(__file__).resolve().parents[2]
OF_A_LAYER = "Event.synchronize in moe/token_dispatcher.py _maybe_dtoh_and_synchronize"
OF_A_MICRO_BATCH = "nonzero in layers/attention.py document_edges"
MOST_WAITS_OF_A_STEP = 14


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.dry_run.cases", "suite"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S)
    assert done.returncode == 0, done.stderr
    return {name: one for line in done.stdout.splitlines() for name, one in json.loads(line).items()}


@pytest.mark.parametrize("name", SUITE)
def test_ranks_start_and_step_without_growing(outcomes: dict, name: str) -> None:
    one = outcomes[name]
    assert "error" not in one, one["error"]
    assert all(len(set(live[1:])) == 1 for live in one["live"])
    assert "_scaled_dot_product_efficient_attention" not in one["operators"], "attention has a mask"


@pytest.mark.parametrize("name", SUITE)
def test_the_host_waits_once_per_layer_and_micro_batch(outcomes: dict, name: str) -> None:
    """And once more where a layer is recomputed; other waits do not grow with the micro-batches."""
    one = outcomes[name]
    layers, micro_batches, waits = one["moe_layers_of_first"], one["micro_batches"], dict(one["waits"])
    recomputed = 2 if "recompute" in name else 1
    assert waits.pop(OF_A_LAYER, 0) == layers * micro_batches * recomputed
    assert waits.pop(OF_A_MICRO_BATCH, 0) == ("documents apart" in name) * micro_batches
    exchanges = sum(number for place, number in waits.items() if "p2p_communication" in place)
    assert exchanges <= 3 * micro_batches * (one["stages"] > 1)
    assert sum(waits.values()) - exchanges <= MOST_WAITS_OF_A_STEP
    assert not [place for place in waits if place.endswith("optimizer_fixes.py step")], "the optimizer waits"


@pytest.mark.parametrize("name", SUITE)
def test_ranks_launch_the_same_collectives(outcomes: dict, name: str) -> None:
    actual = outcomes[name]["disagreements"]
    if "edges PP2" in name:
        # The stand-in of all_gather_object knows the parameter groups of its own rank only, so a rank that trains
        # nothing has no optimizer here. A real one has an empty one, and asks the others too (tried in bf16, gloo).
        actual = [message for message in actual if "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP" not in message]
    assert actual == []


@pytest.mark.parametrize("name", REAL)
def test_memory_is_the_planners(outcomes: dict, name: str) -> None:
    assert outcomes[name]["peaks"] == pytest.approx(outcomes[name]["planned"], rel=0.03)


def test_forty_original_experts_take_the_time_that_the_planner_says(outcomes: dict) -> None:
    one = outcomes["Granite-3.1-3B-A800M stage1"]
    assert one["step_s"] == pytest.approx(one["planned_s"], rel=0.1)


def test_a_layer_is_as_lean_as_megatrons(outcomes: dict) -> None:
    """Launches, and bytes without those of the original expert's weights."""
    (stock_launches, stock_bytes), (launches, num_bytes) = outcomes["against Megatron"]
    assert launches <= stock_launches and num_bytes <= 0.95 * stock_bytes


@pytest.mark.parametrize("window", [None, 0, 7, 100])
def test_attention_counts_the_pairs_of_tokens_within_the_window(window: int | None) -> None:
    length, sequences, width = 32, 3, 8
    attends = torch.ones(length, length).tril().triu(-length if window is None else -window)
    products = 2 * 2 * sequences * int(attends.sum()) * width  # two, of a multiply and an add each
    query, size = torch.empty(sequences * length, 2, width // 2), None if window is None else [window, 0]
    assert attention_flops(query, length, is_backward=False, window_size=size) == products
    assert attention_flops(query, length, is_backward=True, window_size=size) == products * 5 // 2


def test_experts_exchange_what_the_planner_says(outcomes: dict) -> None:
    """On the last pipeline stage: in the first MoE layer of a model, rows of new experts need no gradient."""
    one = outcomes["Qwen2.5-72B stage1"]
    assert one["moved"] == pytest.approx(one["traffic"], rel=0.02)
    one = outcomes["Qwen3-8B stage2"]
    assert one["moved"][0] == pytest.approx(one["traffic"][0] * 7 / 8, rel=0.02)


def check(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moelpr", "check", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PROCESS_S)


def test_a_project_runs_its_stages_without_gpus_and_programs_read_the_numbers(tmp_path: Path, monkeypatch) -> None:
    """The command is that of `moelpr plan --check`: neither text nor checkpoint is there."""
    path = write_project(tmp_path)
    path.write_text(path.read_text().replace("gpu: none", "gpu: h100-80\n  gpus: 2\n  gpus_per_node: 2"))
    monkeypatch.chdir(tmp_path)
    _, _, *words = check_words(ResolvedProject(read_project(path)), "stage2")
    done = check(*words, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)
    assert [rank["rank"] for rank in actual["ranks"]] == [0] and actual["disagreements"] == []
    for rank in actual["ranks"]:
        assert rank["peak_bytes"] == sum(rank["memory_bytes"].values()) > 0
        assert sum(one["launches"] for one in rank["kernels"].values()) > 100
    assert any("replay" in missing for missing in actual["not_here"])
    assert actual["step_seconds"]["h100-80"]["dry_run"] > 0


def test_a_wrong_command_line_is_refused_as_the_trainer_does(tmp_path: Path, monkeypatch) -> None:
    """On the checkpoint that the command names, not on what takes its place; other kernels may be installed."""
    for name in ("transformer_engine", "apex", "fla"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    MODELS["all-moe"].write(tmp_path)
    flags = f"--lr 1e-4 --train-iters 9 --micro-batch-size 1 --global-batch-size 8 --pretrained-checkpoint {tmp_path}"
    flags += " --seq-length 64 --data-path nowhere/el --expert-model-parallel-size 3"
    done = check("stage1", "--nproc_per_node", "6", *flags.split())
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert "--expert-model-parallel-size 3 does not divide the model's 4 new experts" in done.stderr
