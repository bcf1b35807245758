"""The layouts and the new experts that a project gets on its GPUs, and what the plan says about them."""

import re
from pathlib import Path
from typing import Any

import pytest

from moelpr.base import machine
from moelpr.base.errors import UserError
from moelpr.plan.gpus import GIB
from moelpr.plan.memory import PROCESS_BYTES
from moelpr.project import tables
from moelpr.project.budget import check_budget
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from tests.support.hf_models import edit_json
from tests.support.model_shapes import save_config
from tests.unit.project.conftest import Write

A100S = {"gpu": "a100-40", "gpus": 8, "gpus_per_node": 4}
EPOCHS = {"el": {"text": "el.jsonl", "max_epochs": 1e9}}


def places(write: Write, model: str = "Llama-3.1-8B", **changes: Any) -> ResolvedProject:
    if not Path(model).exists():
        save_config(model, Path(model))
    return ResolvedProject(read_project(write(**{"model": model, "hardware": A100S, "experts": "auto"} | changes)))


def gib(one: ResolvedProject, stage: str = "stage1") -> float:
    plan = one.layouts.of(stage).plan
    assert plan is not None
    return plan.memory_bytes / GIB


def test_auto_takes_the_most_experts_that_fit_with_any_micro_batch(write: Write) -> None:
    """Two experts need a smaller micro-batch than the recipe's 8, at which one fits."""
    auto = places(write)
    assert auto.layouts.num_new_experts == 2 and gib(auto) < 36
    with pytest.raises(UserError, match="stage1: no layout fits on 8 GPUs"):
        _ = places(write, experts={"new": 4}).layouts.of("stage1")
    of_one = places(write, steps={"stage1": {"micro-batch-size": 1}})
    assert of_one.layouts.num_new_experts == 2 and gib(of_one) == pytest.approx(30.9, abs=0.05)
    assert places(write, steps={"stage1": {"micro-batch-size": 8}}).layouts.num_new_experts == 1


def test_the_disk_is_that_of_the_checkpoints_that_the_file_keeps(write: Write) -> None:
    """6B tokens are 11,444 steps: of every 10,000th one is kept, of every 1,000th 11, and the last two."""
    of_recipe, often, rarely = (
        places(write, steps={"stage1": {"save-retain-interval": steps}} if steps else {}).layouts.of("stage1")
        for steps in (0, 1000, 100_000)
    )
    assert of_recipe.plan is not None
    one = of_recipe.plan.disk.checkpoint / GIB
    assert [layout.disk_gib(6e9) / one for layout in (of_recipe, often, rarely)] == [3, 13, 2]


def test_a_micro_batch_that_is_given_stays_and_another_is_at_least_as_fast(write: Write) -> None:
    speeds = {}
    for size in (1, 2, 4, 8, 16):
        layout = places(write, experts={"new": 2}, steps={"stage1": {"micro-batch-size": size}}).layouts.of("stage1")
        assert layout.plan is not None and layout.plan.workload.micro_batch_size == size
        speeds[size] = layout.tokens_per_s
    assert places(write, experts={"new": 2}).layouts.of("stage1").tokens_per_s == max(speeds.values())


def test_the_plan_says_what_the_model_becomes_and_what_another_number_of_experts_costs(write: Write) -> None:
    """Llama-3.1-8B has 8,030,261,248 parameters; K copies and two new experts are three FFNs more, a token uses one."""
    languages = {"expanded": {code: {"text": f"{code}.jsonl", "max_epochs": 1e9} for code in ("el", "hu", "es")}}
    settings: dict[str, Any] = {"languages": languages | {"original": {"en": "en.jsonl"}}, "budget": {"tokens": "6B"}}
    printed = tables.plan(places(write, **settings))
    ffn = 32 * 3 * 4096 * 14336
    assert "N = 2 (auto) in each of 32 layers, K = 2, copies of the original expert: 2.\n" in printed
    assert f"{(8_030_261_248 + 3 * ffn) / 1e9:.1f}B parameters, {(8_030_261_248 + ffn) / 1e9:.1f}B active" in printed
    assert f"With method: auto, {(8_030_261_248 + ffn) / 1e9:.1f}B parameters, stage ffn: " in printed
    assert "warning: N = 2 is less than the number of expanded languages, 3" in printed
    other = tables.plan(places(write, experts={"new": 1}, **settings))
    [actual] = re.findall(r"^Stage 1 with N = 1: (.*), ([\d,]+) GPU hours, ([\d.]+) GiB", printed, re.MULTILINE)
    [row] = re.findall(r"^stage1 +to do +(\S+ \w+) +([\d,]+) +([\d.]+) of 40 GiB", other, re.MULTILINE)
    assert actual == row and "N = 1 (given)" in other
    assert re.search("^Stage 1 with N = 2: ", other, re.MULTILINE) and "N = 4: " not in printed
    assert "warning: N" not in tables.plan(places(write, experts={"new": 4}, hardware={"gpu": "none"}))


def test_an_optimizer_on_the_host_is_named_but_not_chosen(write: Write) -> None:
    small: dict[str, Any] = {"model": "Qwen3-1.7B-Base", "hardware": {"gpu": "rtx4090-24", "gpus": 1}}
    with pytest.raises(
        UserError, match=r"line \d+: stage1: .* steps.stage1.optimizer-cpu-offload: true \(fits in"
    ) as it:
        _ = places(write, **small, experts={"new": 2}).layouts.of("stage1")
    assert "--" not in str(it.value) and str(it.value).count("stage1: ") == 1
    on_host = {"stage1": {"optimizer-cpu-offload": True}, "stage2": {"optimizer-cpu-offload": True}}
    offloaded = places(write, steps=on_host, **small, budget={"tokens": "6K"})
    assert offloaded.layouts.num_new_experts == 2 and gib(offloaded) == pytest.approx(20.9, abs=0.05)
    [host] = re.findall(r"^stage1 .* 20.9 of 24 GiB +([\d.]+) GiB ", tables.plan(offloaded), re.MULTILINE)
    ffn = 28 * 3 * 2048 * 6144  # 20 bytes for each of two new ones, and two copies of all weights in bf16
    assert float(host) == pytest.approx(4 + (20 * 2 * ffn + 2 * 2 * 3.84e9) / GIB, rel=0.03)


def test_if_nothing_fits_whole_combinations_that_do_are_named_by_keys_the_second_ffn_first(write: Write) -> None:
    small: dict[str, Any] = {"model": "Qwen3-1.7B-Base", "hardware": {"gpu": "rtx4090-24", "gpus": 1}}
    with pytest.raises(UserError) as error:
        _ = places(write, **small, steps={"stage1": {"micro-batch-size": 64}}, experts={"new": 2}).layouts.of("stage1")
    first, combination, *_ = str(error.value).partition("; use ")[2].split(", ")
    assert re.fullmatch(r"method: second-ffn \(fits in [\d.]+ GiB\)", first)
    keys = r"steps.stage1.optimizer-cpu-offload: true with steps.stage1.micro-batch-size: (\d+)"
    actual = re.fullmatch(keys + r" \(fits in ([\d.]+) GiB\)", combination)
    assert actual and ", or hardware.gpus: 4" in str(error.value)
    steps = {"stage1": {"micro-batch-size": int(actual[1]), "optimizer-cpu-offload": True}}
    assert gib(places(write, **small, steps=steps, experts={"new": 2})) == pytest.approx(float(actual[2]), abs=0.05)
    large: dict[str, Any] = {"model": "Qwen3-8B-Base", "hardware": small["hardware"], "method": "second-ffn"}
    with pytest.raises(UserError, match=r"or method: second-ffn with experts: {rank: 64} \(the base has 15.\d GiB\)"):
        _ = places(write, **large, experts="auto").layouts.of("ffn")


def test_stage_1_is_planned_with_what_it_trains(write: Write) -> None:
    paper: dict[str, Any] = {"model": "Qwen1.5-1.8B", "hardware": {"gpu": "a800-80", "gpus": 8}}
    paper["experts"] = {"new": 5, "topk": 2, "copies": 1}
    everything = {"train-everything": True, "micro-batch-size": 8}
    assert gib(places(write, **paper)) == pytest.approx(52.5, abs=0.05)
    one = places(write, steps={"stage1": everything}, **paper)
    assert gib(one) == pytest.approx(69.6, abs=0.05)
    assert "--train-everything" not in one.layouts.of("stage1").flags
    kept = {"expanded": EPOCHS, "original": {"en": "en.jsonl"}, "kept": {"code": "es.jsonl"}}
    plan = places(write, languages=kept, replay="none", vocabulary={"new_tokens": 9}).layouts.of("stage1").plan
    assert plan is not None and plan.workload.stage1_experts == "new" and plan.workload.new_embeddings


def test_a_chat_model_that_cannot_be_added_to_the_base_is_refused(write: Write) -> None:
    for name in ("Qwen3-8B", "Qwen3-1.7B"):
        save_config(f"{name}-Base", Path(name))
    edit_json(Path("Qwen3-8B/config.json"), max_position_embeddings=40960)  # as published ones differ
    base: dict[str, Any] = {"model": "Qwen3-8B-Base", "hardware": {"gpu": "h100-80", "gpus": 8}, "method": "auto"}
    base |= {
        "budget": {"tokens": "6K"},
        "steps": {"ffn": {"global-batch-size": 1, "micro-batch-size": 1}, "stage2": {"global-batch-size": 16}},
        "experts": None,
    }
    check_budget(places(write, chat="Qwen3-8B", **base))
    with pytest.raises(
        UserError, match=r"line \d+: chat: .*ffn_hidden_size is 12288 and 6144; name the base's own chat"
    ):
        check_budget(places(write, chat="Qwen3-1.7B", **base))


def test_on_a_cpu_a_training_needs_fp32_weights_and_adam_for_what_trains(write: Write, monkeypatch) -> None:
    """And the softmax over the vocabulary in fp32, next to smaller activations."""
    steps = {"ffn": {"seq-length": 64, "micro-batch-size": 4}}
    one = places(write, "Qwen3-0.6B-Base", method="second-ffn", experts=None, hardware={"gpu": "none"}, steps=steps)
    ffn, attention, rows, logits = 28 * 3 * 1024 * 3072, 28 * 2 * 1024 * (16 + 8) * 128, 151_936 * 1024, 256 * 151_936
    least = 4 * (ffn + attention + rows) + 12 * ffn + 4 * logits + PROCESS_BYTES
    needed = one.layouts.of("ffn").memory_gib * GIB
    assert least < needed < 1.2 * least
    for free, answer in (
        (needed + GIB, r"yes\."),
        (needed - GIB, r"no, .* are free, and task ffn needs [67]\.\d+ GiB;"),
    ):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: int(free))
        assert re.match(f"Fits: {answer}", tables.plan(one))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"global-batch-size": 6, "micro-batch-size": 4}, r"ffn: steps.ffn.global-batch-size: 6 is not a multiple of"),
        ({"seq-length": 10**6}, r"ffn: steps.ffn.seq-length must be at most 131072"),
    ],
)
def test_on_a_cpu_a_training_that_its_trainer_would_refuse_is_refused(write: Write, flags, message) -> None:
    one = places(write, "Qwen3-0.6B-Base", method="ffn", experts=None, hardware={"gpu": "none"}, steps={"ffn": flags})
    with pytest.raises(UserError, match=message):
        one.layouts.of("ffn")


def test_sizes_that_a_user_chooses_are_planned_or_refused_with_those_that_work(write: Write) -> None:
    def one(**sizes: int) -> ResolvedProject:
        steps = {"stage1": {f"{name}-model-parallel-size": size for name, size in sizes.items()}}
        return places(write, experts={"new": 2}, steps=steps)

    flags = one(tensor=4).layouts.of("stage1").flags
    assert flags[flags.index("--tensor-model-parallel-size") + 1] == "4"
    assert places(write, experts={"new": 2}).layouts.of("stage1").flags[1] != "4"
    for sizes, wrong, works in (
        ({"tensor": 3}, "tensor-model-parallel-size: 3", "1, 2, 4"),
        ({"tensor": 4, "pipeline": 8}, "pipeline-model-parallel-size: 8", "1, 2"),
    ):
        with pytest.raises(
            UserError, match=rf"stage1: .* 8 GPUs has steps.stage1.{wrong}; use one of {works}, or remove"
        ):
            one(**sizes).layouts.of("stage1")
    recipe = Path("mine.yaml")
    recipe.write_text("lr: 1e-3\n")
    with pytest.raises(UserError, match=r"line \d+: stage1: steps.stage1.global-batch-size is missing"):
        places(write, steps={"stage1": {"recipe": str(recipe)}}).layouts.of("stage1")
