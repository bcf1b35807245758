"""The whole model's forward step in bf16 on fake CUDA tensors: no device or dtype mismatch, and no unexpected wait.

The host waits for the GPU once per MoE layer and micro-batch, where Megatron's dispatcher reads how many rows it sends.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.forwards import BATCH, CASES, SEQUENCE

DISPATCHER = ["Event.synchronize in moe/token_dispatcher.py _maybe_dtoh_and_synchronize"]
DOCUMENT_EDGES = ["nonzero in model/attention.py document_edges"]  # once per micro-batch


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.fake_gpu.forwards"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_forward_step_runs_on_a_gpu_and_waits_once_per_moe_layer(outcomes: dict, name: str) -> None:
    outcome, case = outcomes[name], CASES[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["loss"] == "torch.float32 cuda:0"
    assert outcome["output"] == [BATCH, SEQUENCE]
    assert outcome["layers"] == [DISPATCHER, DISPATCHER]
    assert outcome["outside"] == (DOCUMENT_EDGES if "dataloader_inter_document_masking" in case.settings else [])


def test_the_optimizer_does_not_wait(outcomes: dict) -> None:
    assert outcomes["optimizer"]["outside"] == []
