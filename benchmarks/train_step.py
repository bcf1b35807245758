"""Tokens per second of a step of each stage in one process, against two peers and the rate of a large matmul.

    python -m benchmarks.train_step [--json FILE]

All contenders have the same sizes, data and threads, and take turns in every round. Times are medians over the rounds,
ratios medians of the rounds' ratios.

Routers are made to choose places at random. Stage ffn trains the FFNs of the same model without experts, stage dense
all of it. `LIMITS` has what is hoped for.

- ours: model and freezing of the trainer, Megatron's DistributedDataParallel, schedule and optimizer.
- plain Megatron: the same with Megatron's MoELayer and SequentialMLP over all E experts, every parameter trained.
- stock transformers: Qwen2Moe with grouped_mm and a masked gradient, the same two stages (baselines/stock_moe.py).

The peers hold and compute each copy of the dense FFN as an expert like any other.

The fraction of the matmul rate counts only the work a step cannot avoid (`needed_flops`) and compares it with one large
matrix product of the same dtype, timed in the same rounds. On a GPU everything runs in bf16; that path is untested. The
peers' optimizers then keep no fp32 copies of their weights, which ours does: they move less memory, and lose updates.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import STAGES, add_cpu_time, argument_parser, install_megatron, print_table, write_json
from benchmarks.imposed_routing import impose, uniform_choices
from benchmarks.timing import Turns, Work, median_s, time_ratio
from moelpr.base.command import run_command
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES, Stage
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Routing, Workload, model_parts
from moelpr.plan.step_time import stage_flops

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
RATIOS = {  # slower, faster
    "stage1 to plain Megatron": ("plain Megatron", "ours, stage1"),
    "stage2 to plain Megatron": ("plain Megatron", "ours, stage2"),
    "stage1 to stock transformers": ("stock transformers, stage1", "ours, stage1"),
    "stage2 to stock transformers": ("stock transformers, stage2", "ours, stage2"),
    "stage2 to stage1": ("ours, stage1", "ours, stage2"),
    "ffn to stock transformers": ("stock transformers, ffn", "ours, ffn"),
    "ffn to full fine-tuning": ("ours, dense", "ours, ffn"),
}
LIMITS = {"stage2 to stage1": 1.5, "ffn to stock transformers": 1.2, "ffn to full fine-tuning": 1.12}  # at least


def main() -> None:
    sizes = dict(layers=4, hidden=512, ffn=1536, head=64, vocabulary=4096, sequences=4, length=256, rounds=5)
    parser = argument_parser(__doc__, **sizes, new_experts=4, original_copies=2, topk=2)
    add_cpu_time(parser)
    args = parser.parse_args()
    install_megatron()
    from benchmarks.optimizer_steps import spec_of
    from moelpr.model.megatron.bootstrap import single_process

    with single_process():
        result = measure(spec_of(args), args.sequences, Turns(args.rounds, args.cpu_time))
    print_table([result])
    print_table([{"step": name, **row} for name, row in result["contenders"].items()])
    ratios = result["ratios"].items()
    print_table([{"tokens/s": name, "ratio": ratio, "wanted": LIMITS.get(name, "")} for name, ratio in ratios])
    write_json(result, args.json)


def needed_flops(spec: ModelSpec, stage: Stage, sequences: int, rows: list[tuple[int, int]]) -> float:
    """The operations that a step cannot avoid, by the planner's count; `rows` are those of each layer (`rows_of`)."""
    length = spec.megatron_args["max_position_embeddings"]
    tokens = len(rows) * sequences * length
    routing = Routing(*(sum(of_layers) / tokens for of_layers in zip(*rows, strict=True)))
    workload = Workload(stage, length, sequences, sequences)
    return stage_flops(spec, model_parts(spec), PlannedLayout(), workload, 0, routing).once


def rows_of(choices_TK: Tensor, original_copies: int) -> tuple[int, int]:
    """(tokens that chose a copy of the original expert, choices of new experts)."""
    is_new_TK = choices_TK >= original_copies
    return int((~is_new_TK).any(dim=1).sum()), int(is_new_TK.sum())


def measure(spec: ModelSpec, sequences: int, turns: Turns) -> dict:
    """Times, rates and ratios of all contenders, as written to JSON."""
    from benchmarks.baselines.stock_moe import StockStep
    from benchmarks.optimizer_steps import DEVICE, our_step, plain_step, random_batch

    moe = spec.moe
    assert moe is not None
    torch.manual_seed(1)
    batch = random_batch(spec, sequences)
    tokens, size = batch["tokens"].numel(), MATMUL_SIZE[DEVICE]
    left, right = (torch.randn(size, size, device=DEVICE, dtype=getattr(torch, spec.dtype)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    choices = [uniform_choices(tokens, moe.num_experts, moe.topk, generator) for _ in moe.layers]
    rows = [rows_of(part, moe.original_copies) for part in choices]
    steps: dict[str, Any] = {f"ours, {stage}": our_step(spec, stage, batch) for stage in STAGES}
    steps |= {"plain Megatron": plain_step(spec, batch)}
    steps |= {f"stock transformers, {stage}": StockStep(spec, stage, batch) for stage in STAGES}
    for step in steps.values():
        for router, part in zip(step.routers, choices, strict=True):
            impose(router, part.to(DEVICE))
    dense = replace(spec, moe=None)
    steps |= {f"ours, {stage}": our_step(dense, stage, batch) for stage in DENSE_STAGES}
    steps["stock transformers, ffn"] = StockStep(dense, "ffn", batch)
    work: dict[str, Work] = {**steps, "matmul": lambda: left @ right}
    times = turns.take(work)
    medians = median_s(times)
    table = {name: {"step_time_s": medians[name], "tokens_per_s": tokens / medians[name]} for name in steps}
    for stage in STAGES:
        count = needed_flops(spec, stage, sequences, rows)
        share = count / (2 * size**3) * time_ratio(times, "matmul", f"ours, {stage}")
        table[f"ours, {stage}"] |= {"needed_gflop": count / 1e9, "share_of_matmul_rate": share}
    shape = {name: spec.megatron_args[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")}
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": spec.dtype,
        "tokens_per_step": tokens,
        "shape": shape | {"new_experts": moe.num_new_experts, "original_copies": moe.original_copies, "topk": moe.topk},
        "original_and_new_rows": rows,
        "rounds": turns.rounds,
        "clock": "CPU time" if turns.cpu_time else "wall time",
        "matmul_gflop_per_s": 2 * size**3 / medians["matmul"] / 1e9,
        "contenders": table,
        "ratios": {name: time_ratio(times, *pair) for name, pair in RATIOS.items()},
        "times_s": times,
    }


if __name__ == "__main__":
    run_command(main)
