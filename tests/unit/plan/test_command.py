"""The command: what it prints, and bad input as one sentence and exit code 2."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelpr.errors import run_command
from moelpr.plan.__main__ import main

Plan = Callable[..., str]


@pytest.fixture
def plan(
    config_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plan:
    """Run the command on the small model; returns stdout. Flags given again win."""

    def run(*words: str, **changes: object) -> str:
        defaults = ["--hf-path", str(config_folder(**changes)), "--num-new-experts", "4", "--gpus", "8"]
        monkeypatch.setattr(sys, "argv", ["plan", *defaults, "--gpu-memory-gib", "1", *words])
        main()
        return capsys.readouterr().out

    return run


def test_the_recommended_flags_are_those_of_the_first_row(plan: Plan) -> None:
    shown = plan("--seq-length", "256", "--micro-batch-size", "2")
    first_row = next(line for line in shown.splitlines() if re.match(r" +\d+ +\d+", line))
    assert first_row.split()[:6] == ["1", "1", "1", "1", "8", "none"]
    assert shown.splitlines()[-2:] == [
        "Recommended, behind launch/stage1.sh:",
        "  --use-distributed-optimizer --micro-batch-size 2 --global-batch-size 512 --seq-length 256",
    ]


def test_json_has_every_layout_with_every_stage_in_bytes(plan: Plan) -> None:
    found = json.loads(plan("--json"))
    assert found["recommended"] == found["layouts"][0]
    for layout in found["layouts"]:
        assert len(layout["stages"]) == layout["pp"]
        assert layout["fullest_rank"]["total_bytes"] == max(rank["total_bytes"] for rank in layout["stages"])
        assert layout["fullest_rank"]["total_bytes"] <= 0.9 * 2**30
    assert {layout["tp"] for layout in found["layouts"]} == {1, 2, 4, 8}


def test_less_memory_leaves_fewer_layouts_and_another_recommendation(plan: Plan) -> None:
    roomy, tight = (json.loads(plan("--json", "--gpu-memory-gib", size)) for size in ("1", "0.006"))
    assert len(tight["layouts"]) < len(roomy["layouts"])
    assert tight["recommended"]["flags"] != roomy["recommended"]["flags"]
    assert tight["recommended"]["fullest_rank"]["total_bytes"] <= 0.9 * 0.006 * 2**30


def test_stage2_needs_no_more_than_stage1(plan: Plan) -> None:
    words = ("--json", "--seq-length", "512")
    first, second = (json.loads(plan(*words, "--stage", stage)) for stage in ("stage1", "stage2"))
    assert first["run"]["stage"] == "stage1" and second["run"]["stage"] == "stage2"
    names = ("tp", "pp", "ep", "etp", "recompute")
    of_stage1 = {tuple(one[name] for name in names): one["fullest_rank"] for one in first["layouts"]}
    for one in second["layouts"]:
        assert one["fullest_rank"]["optimizer_bytes"] < of_stage1[tuple(one[name] for name in names)]["optimizer_bytes"]


def failure(plan: Plan, capsys: pytest.CaptureFixture[str], *words: str, **changes: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: plan(*words, **changes) and None)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "12"], "12 GPUs are no whole number of nodes of 8; use --gpus 8 or 16"),
        (["--gpus", "7"], "over 7 GPUs; use --gpus 4 or 8"),
        (["--num-new-experts", "0"], "at least 1 is needed"),
        (["--topk", "1"], "use --topk 2"),
        (["--topk", "9"], "use --topk between 2 and 5"),
        (["--moe-layers", "7"], "the model has no layer 7"),
        (["--hf-path", "nowhere"], "there is no folder nowhere"),
        (["--seq-length", "5000"], "longer than the model's max_position_embeddings 4096; use at most 4096"),
        (["--micro-batch-size", "3"], "512 does not divide into micro-batches of 3"),
        (["--reserve-gib", "1"], "leaves nothing of 1 GiB"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    plan: Plan, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert re.search(said, failure(plan, capsys, *words))


def test_an_unknown_family_is_named(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(plan, capsys, architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in said and "LlamaForCausalLM" in said


def test_both_remedies_of_a_model_that_fits_nowhere_work(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "2", "--gpus-per-node", "4", "--gpu-memory-gib", "0.005", "--reserve-gib", "0"]
    said = failure(plan, capsys, *words)
    remedies = re.search(r"on 2 GPUs the leanest layout needs .*--gpu-memory-gib (\S+) or more, or --gpus (\d+)", said)
    assert remedies is not None, said
    memory, gpus = remedies.groups()
    assert plan(*words, "--gpu-memory-gib", memory)
    assert plan(*words, "--gpus", gpus)
