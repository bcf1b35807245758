"""The launcher trains tiny models under flags that a GPU has not seen: it saves, resumes, and scores text.

Cases of a base have the same weights and text, so their losses must be those of its first case. On CPU ranks without a
GPU, on all GPUs otherwise. launch/first_contact.sh shows the outcome of each case in a table.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common
from moelpr.base.command import stopped_code
from moelpr.base.run_folder import METRICS_FILE
from moelpr.project.workflow.execution import execute

VOCABULARY, BATCH = 512, 16
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0  # Megatron on a CPU counts one
FEW = 16  # the tokens of the text, so that its loss soon falls by more than rounding makes
LIMIT_S = 120 if GPUS else 600  # a start of the launcher
DTYPE, DUE = ("bfloat16", 5e-3) if GPUS else ("float32", 1e-5)  # the relative difference that rounding may make
FLAGS = f"""
    {"--bf16" if GPUS else "--fp32"} --seq-length 128 --micro-batch-size 1 --global-batch-size {BATCH} --train-iters 4
    --lr 4e-3 --lr-decay-style constant --eval-interval 2 --eval-iters 1 --save-interval 2
"""


@dataclass(frozen=True)
class Case:
    """A case: the ranks of one copy of the model, and flags; one that resumes ends after step 2 and starts again."""

    name: str
    ranks: int = 1
    flags: str = ""
    resumes: bool = False
    base: str = "dense"


_TP2, _OVERLAP = "--tensor-model-parallel-size 2 --sequence-parallel", "--overlap-grad-reduce --overlap-param-gather"
_PP2 = f"--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer {_OVERLAP} {_TP2}"
_NODES = (
    "--ckpt-assume-constant-structure --ckpt-fully-parallel-load --manual-gc --manual-gc-interval 2 --save-interval 1"
)
_NODES += " --gpu-sniff-test-interval 999" * (GPUS > 0)
_APART = "--dataloader-inter-document-masking --transformer-impl local"  # Transformer Engine does not support it
_BY_PARAMETER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
FIRST = Case("data parallelism")
# Its text is copies of one document, whose order does not matter: two in a sample, and here one.
MOE = Case("MoE base", 1, "--seq-length 64 --micro-batch-size 2 --global-batch-size 32", base="moe")
CASES = (
    Case("saved by a helper, and resumed", 1, "--async-save", resumes=True),
    Case("gradients of experts added apart", 1, "--no-gradient-accumulation-fusion"),
    Case("layers without Transformer Engine", 1, "--transformer-impl local"),
    Case("layers recomputed", 1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    Case("optimizer on the host", 1, "--optimizer-cpu-offload --use-distributed-optimizer", resumes=True),
    Case("moments in bf16", 1, f"--bf16-moments {_BY_PARAMETER}", resumes=True),
    Case("MoE base, documents apart", 1, f"{_APART} --async-save", base="moe"),
    Case("TP 2, ETP 2", 2, f"{_TP2} --expert-tensor-parallel-size 2"),
    Case("PP 2, TP 2, EP 2", 4, f"{_PP2} --expert-tensor-parallel-size 1 --async-save {_NODES}", resumes=True),
)


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, float]]:
    """Runs a case, once; returns the losses of its steps and of scored text."""
    folder = tmp_path_factory.mktemp("cases")
    shape: dict[str, Any] = dict(num_hidden_layers=2, hidden_size=256, intermediate_size=512, vocab_size=VOCABULARY)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, dtype=DTYPE)
    from transformers import GraniteMoeConfig, Qwen2Config

    moe = shape | dict(intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)
    for name, config in {"dense": Qwen2Config(**shape), "moe": GraniteMoeConfig(**moe)}.items():
        common.upcycle(common.save_random_model(config, folder / f"{name}-hf"), folder / name, 4, random=True)
    random = np.random.default_rng(0)
    for name, every in {"text": 4, "scored": 999}.items():  # every fourth document is of an original language
        documents = ((random.integers(0, FEW, 100), number % every == every - 1) for number in range(256))
        common.write_corpus(folder / f"dense-{name}", VOCABULARY, documents)
        common.write_corpus(folder / f"moe-{name}", VOCABULARY, [(random.integers(0, FEW, 64), False)] * 256)

    @cache
    def run(case: Case) -> dict[str, float]:
        save, log = folder / f"save-{case.name}", folder / f"{case.name}.log"
        words = f"moelpr train stage1 --nproc-per-node {ranks_of(case)} {FLAGS} {case.flags}".split()
        words += ["--validation-data", f"new={folder / case.base}-scored", "--data-path", f"{folder / case.base}-text"]
        words += ["--save", str(save), "--pretrained-checkpoint", str(folder / case.base)]
        for end in [["--exit-interval", "2"], []] if case.resumes else [[]]:
            code = execute([*words, *end], log, common.environment(), limit_s=LIMIT_S, stderr=subprocess.STDOUT)
            assert code == (stopped_code() if end else 0), log.read_text(errors="replace")[-5000:]
        losses = {}
        for record in map(json.loads, (save / METRICS_FILE).read_text().splitlines()):
            is_scored = record.get("event") == "validation"
            of = record["languages"]["new"] if is_scored else record
            if "lm_loss" in of:  # else a warning
                losses[f"{'scored' if is_scored else 'step'} {record['iteration']}"] = of["lm_loss"]
        return losses

    return run


def ranks_of(case: Case) -> int:
    """As many copies of the model as there are GPUs for, and as divide a batch; one on CPU ranks."""
    return case.ranks * 2 ** (min(max(GPUS // case.ranks, 1), BATCH).bit_length() - 1)


@pytest.mark.parametrize("first", [FIRST, MOE], ids=lambda case: case.name)
def test_the_first_case_learns(losses_of: Callable, first: Case) -> None:
    losses = losses_of(first)
    assert list(losses) == ["scored 0", "step 1", "step 2", "scored 2", "step 3", "step 4", "scored 4"]
    assert losses["step 4"] < 0.9 * losses["step 1"] and losses["scored 4"] < 0.9 * losses["scored 0"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_those_of_the_first_case(losses_of: Callable, case: Case, record_property: Callable) -> None:
    if GPUS and case.ranks > GPUS:
        pytest.skip(f"needs {case.ranks} GPUs")
    if case.flags.startswith(("--transformer-impl", "--bf16-moments")):
        pytest.importorskip("transformer_engine", reason="needs Transformer Engine", exc_type=ImportError)
    expected, losses = losses_of(FIRST if case.base == FIRST.base else MOE), losses_of(case)
    assert losses.keys() == expected.keys()
    record_property("ranks", ranks_of(case))
    difference = max(abs(losses[name] - loss) / loss for name, loss in expected.items())
    record_property("difference", f"{difference:.1e}")
    assert difference <= DUE
