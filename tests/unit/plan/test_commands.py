"""The command: what it prints, and that bad input is one sentence and exit code 2."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from moelpr.base.command import run_command
from moelpr.base.machine import format_bytes
from moelpr.plan import gpus
from moelpr.plan.stage_plan import PAPER_GLOBAL_BATCH_SIZE, PAPER_SEQ_LENGTH
from tests.support.commands import moelpr

Plan = Callable[..., str]


@pytest.fixture
def plan(config_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Plan:
    """Run the command on the small model and return stdout. `argv` overrides the defaults."""

    def run(*argv: str, defaults: bool = True, **changes: object) -> str:
        before = ["--hf-path", str(config_folder(**changes)), "--num-new-experts", "4", "--gpus", "8"]
        before = [*before, "--gpu-memory-gib", "1", "--micro-batch-size", "1"] if defaults else []
        moelpr("layouts", *before, *argv)
        return capsys.readouterr().out

    return run


def first_row(shown: str) -> list[str]:
    return next(line.split() for line in shown.splitlines() if re.match(r" +\d+ +\d+", line))


def test_the_recommended_flags_are_those_of_the_first_row(plan: Plan) -> None:
    argv = ("--seq-length", "256", "--micro-batch-size", "2")
    shown, first = plan(*argv), json.loads(plan(*argv, "--json"))["recommended"]
    names = "tp pp vpp ep etp dp recompute".split()
    assert first_row(shown)[: len(names)] == [str(first[name]) for name in names]
    assert shown.splitlines()[-1].split() == first["flags"] and "--use-distributed-optimizer" in first["flags"]


def test_the_micro_batch_is_the_fastest_unless_it_is_given(plan: Plan, config_folder: Callable[..., Path]) -> None:
    argv = ["--hf-path", str(config_folder()), "--num-new-experts", "4", "--gpus", "8", "--gpu", "h100-80", "--json"]
    plans = [json.loads(plan(*argv, *given, defaults=False)) for given in ([], ["--micro-batch-size", "1"])]
    free, given = (its["recommended"]["predicted"]["tokens_per_s_and_gpu"] for its in plans)
    assert plans[0]["run"]["micro_batch_size"] > 1 == plans[1]["run"]["micro_batch_size"] and free > given


def test_the_size_on_disk_of_a_known_model(plan: Plan, tmp_path: Path) -> None:
    """Qwen1.5-1.8B with the paper's 5 new experts: 1.03 billion parameters, and 0.81 billion for each expert."""
    shape = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
    shape |= {"num_key_value_heads": 16, "vocab_size": 151936, "tie_word_embeddings": False, "head_dim": 128}
    argv = ("--num-new-experts", "5", "--gpu-memory-gib", "80")
    disk = json.loads(plan(*argv, "--json", **shape))["disk_bytes"]
    others, expert = 1.026e9, 0.8116e9
    assert disk["checkpoint"] == pytest.approx(2 * (others + expert) + 14 * 5 * expert, rel=1e-3)
    assert disk["checkpoint_of_what_is_trained"] == pytest.approx(14 * 5 * expert, rel=1e-3)
    assert disk["bf16_export"] == pytest.approx(2 * (others + 7 * expert), rel=1e-3)
    assert f"Disk: {format_bytes(disk['checkpoint'])} for each checkpoint, " in plan(*argv, **shape)


def test_json_has_every_layout_with_every_stage_in_bytes(plan: Plan) -> None:
    actual = json.loads(plan("--json"))
    assert actual["recommended"] == actual["layouts"][0]
    for layout in actual["layouts"]:
        assert len(layout["stages"]) == layout["pp"]
        assert layout["fullest_rank"]["total_bytes"] == max(rank["total_bytes"] for rank in layout["stages"])
        assert layout["fullest_rank"]["total_bytes"] <= 0.9 * 2**30
    assert {layout["tp"] for layout in actual["layouts"]} == {1, 2, 4, 8}


def test_known_gpus_have_predicted_times_and_their_memory(plan: Plan) -> None:
    actual = json.loads(plan("--json", "--gpu", "h200-141"))
    assert actual["cluster"]["gpu_memory_gib"] == 1  # the command line overrides the data sheet
    for layout in actual["layouts"]:
        predicted = layout["predicted"]
        parts = [seconds for name, seconds in predicted.items() if name.endswith("_s") and name != "step_time_s"]
        assert predicted["step_time_s"] == pytest.approx(sum(parts)) and len(parts) == 6
        tokens_per_s = 512 * 1024 / 8 / predicted["step_time_s"]
        assert predicted["tokens_per_s_and_gpu"] == pytest.approx(tokens_per_s)
    assert json.loads(plan("--json"))["recommended"]["predicted"] is None


def test_new_tokens_are_rows_of_the_vocabulary(plan: Plan) -> None:
    """The small model has 1,000."""
    flags = ("--num-new-tokens", "390"), ("--num-new-tokens", "2000")
    plans = [json.loads(plan("--json", "--train-new-embeddings", *argv)) for argv in flags]
    assert [its["vocab_size"] for its in plans] == [1390, 3000]
    few, many = (its["recommended"]["fullest_rank"] for its in plans)
    assert many["trainable"] - few["trainable"] == 2 * (3072 - 1408) * 64  # padded to multiples of 128
    assert plans[0]["recommended"]["flags"][-1] == "--train-new-embeddings"
    frozen = json.loads(plan("--json", "--num-new-tokens", "390"))["recommended"]["fullest_rank"]
    assert few["trainable"] - frozen["trainable"] == 2 * 1408 * 64
    shown = plan("--num-new-tokens", "390", "--stage", "stage0")
    assert "390 new tokens: 1,390 rows of the vocabulary." in shown and "for moelpr train stage0:" in shown


def test_full_fine_tuning_is_planned_with_and_without_experts(plan: Plan, config_folder: Callable[..., Path]) -> None:
    everything = json.loads(plan("--json", "--train-everything"))["recommended"]
    assert everything["fullest_rank"]["frozen"] == 0 and "--train-everything" in everything["flags"]
    argv = ["--hf-path", str(config_folder()), "--gpus", "8", "--gpu-memory-gib", "1"]
    dense = json.loads(plan(*argv, "--stage", "dense", "--json", defaults=False))["recommended"]
    assert dense["fullest_rank"]["frozen"] == 0
    assert not {"--expert-model-parallel-size", "--expert-tensor-parallel-size"} & set(dense["flags"])
    assert "moelpr train dense" in plan(*argv, "--stage", "dense", defaults=False)


def failure(plan: Plan, capsys: pytest.CaptureFixture[str], *argv: str, **changes: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: plan(*argv, **changes) and None)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--gpus", "12"], "--gpus must be a multiple of --gpus-per-node 8, got 12; use --gpus 8 or 16"),
        (["--gpus", "7"], "7 GPUs; use --gpus 6 or 8"),
        (["--gpus", "0"], "--gpus must be "),
        (["--gpu-memory-gib", "inf"], "--gpu-memory-gib must be "),
        (["--moe-layers", "7"], "no layer 7"),
        (["--topk", "1"], "--stage stage1 .* K = 1 .*ffn"),
        (["--hf-path", "nowhere"], "nowhere"),
        (["--seq-length", "5000"], "--seq-length must be at most 4096,.* got 5000"),
        (["--micro-batch-size", "3"], "--global-batch-size 512 .* --micro-batch-size 3"),
        (["--stage", "stage0"], "--stage stage0 .* got none; pass --num-new-tokens"),
        (["--train-new-embeddings"], "--train-new-embeddings .* got none; pass --num-new-tokens"),
        (["--stage", "stage2", "--train-new-embeddings", "--num-new-tokens", "9"], "applies to --stage stage1, got"),
        (["--stage", "dense"], "--stage dense trains a dense model; remove --num-new-experts"),
        (["--stage", "stage0", "--train-everything", "--num-new-tokens", "9"], "remove --train-everything"),
        (["--num-new-experts", "many"], "argument --num-new-experts: invalid"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(plan, capsys, argv, named) -> None:
    assert re.search(named, failure(plan, capsys, *argv))


def test_the_gpus_of_this_machine_are_planned_for(plan: Plan, capsys, monkeypatch, config_folder) -> None:
    monkeypatch.setattr(gpus, "gpus_here", lambda: [("NVIDIA GeForce RTX 4090", 24.0)] * 2)
    argv = ["--hf-path", str(config_folder()), "--num-new-experts", "4", "--gpu", "auto", "--json"]
    actual = json.loads(plan(*argv, defaults=False))
    assert actual["cluster"]["gpu"] == asdict(gpus.GPUS["rtx4090-24"])
    assert (actual["cluster"]["gpus"], actual["cluster"]["gpus_per_node"]) == (2, 2)
    assert json.loads(plan(*argv, "--gpus", "8", defaults=False))["cluster"]["gpus"] == 8, "four such machines"
    without = ["--hf-path", str(config_folder()), "--num-new-experts", "4", "--gpus", "8"]
    assert "--gpu-memory-gib" in failure(plan, capsys, *without, defaults=False)
    monkeypatch.setattr(gpus, "gpus_here", list)
    assert "has no NVIDIA GPU; name the GPUs that will train" in failure(plan, capsys, "--gpu", "auto")


def test_both_suggestions_for_a_model_that_does_not_fit_work(plan, capsys) -> None:
    argv = ["--gpus", "2", "--gpus-per-node", "4", "--gpu-memory-gib", "0.005"]
    error = failure(plan, capsys, *argv)
    fixes = re.search(r" 2 GPUs.*--gpu-memory-gib (\S+) or more, or --gpus (\d+)", error)
    assert fixes is not None, error
    memory, gpus = fixes.groups()
    assert plan(*argv, "--gpu-memory-gib", memory)
    assert plan(*argv, "--gpus", gpus)


def test_the_defaults_are_those_of_the_papers_recipes() -> None:
    for stage, seq_length in PAPER_SEQ_LENGTH.items():
        recipe = yaml.safe_load((Path(__file__).parents[3] / f"launch/recipes/paper-{stage}.yaml").read_text())
        assert (recipe["seq-length"], recipe["global-batch-size"]) == (seq_length, PAPER_GLOBAL_BATCH_SIZE)


def test_the_model_is_the_one_the_converter_would_write(plan: Plan) -> None:
    for flags, layers in (((), 4), (("--moe-every-k-layers", "2"), 2)):
        best = json.loads(plan("--json", "--topk", "2", *flags))["recommended"]
        assert best["fullest_rank"]["trainable"] == layers * (4 * 3 * 64 * 96 + 6 * 64)  # new experts, two copies
