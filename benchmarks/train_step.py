"""Tokens per second of a stage-1 and a stage-2 step in one process against two peers, and its share of the matmul rate.

    python benchmarks/train_step.py [--json FILE]

All contenders have the same sizes, data and threads, and take turns in every round, so that all see the same machine;
times are medians over the rounds, ratios medians of the rounds' ratios.

- ours: model and freezing of the trainer, Megatron's DistributedDataParallel, schedule and optimizer.
- plain Megatron: the same with Megatron's MoELayer and SequentialMLP over all E experts, every parameter trained.
- Python loop: transformers' Qwen2 with a loop over experts and the same two stages (peers/loop_moe.py).

The share of the matmul rate counts only the work a step cannot do without (`needed_flops`) and compares with one large
matrix product of the same type, timed in the same rounds. On a GPU everything runs in bf16; that path is untested.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in benchmarks/ only

from moelpr.megatron_patches import cpu, megatron_fixes  # noqa: E402
from moelpr.model_spec import ModelSpec, MoeSpec  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.megatron_step import MegatronStep
    from moelpr.stages import Stage

BALANCE_COEFF, LPR_COEFF = 0.01, 0.1
STAGES: tuple["Stage", ...] = ("stage1", "stage2")
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
RATIOS = {
    "stage1 to plain Megatron": ("ours, stage1", "plain Megatron"),
    "stage2 to plain Megatron": ("ours, stage2", "plain Megatron"),
    "stage1 to Python loop": ("ours, stage1", "Python loop, stage1"),
    "stage2 to Python loop": ("ours, stage2", "Python loop, stage2"),
    "stage2 to stage1": ("ours, stage2", "ours, stage1"),
}


def main() -> None:
    arguments = _arguments()
    cpu.install()  # before Megatron is imported; does nothing where a GPU is present
    megatron_fixes.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from moelpr.model.loading import single_process

    spec = spec_of(arguments)
    with single_process():
        result = measure(spec, arguments.sequences, arguments.rounds)
    _print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    else:
        print(json.dumps(result))


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """The model all contenders build: Qwen2's shape, every layer an MoE layer."""
    shape = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "ffn_hidden_size": arguments.ffn,
        "num_attention_heads": arguments.hidden // arguments.head,
        "num_query_groups": arguments.hidden // arguments.head // 2,
        "group_query_attention": True,
        "kv_channels": arguments.head,
        "max_position_embeddings": arguments.length,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": arguments.vocabulary,
    }
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    moe = MoeSpec(arguments.new_experts, arguments.topk, tuple(range(arguments.layers)))
    return ModelSpec("qwen2", dtype, shape, moe)


def random_batch(spec: ModelSpec, sequences: int) -> dict[str, Tensor]:
    """Random tokens, every second sequence original-language text, as a dataset would hand them over."""
    size = (sequences, spec.megatron_args["max_position_embeddings"])
    tokens = torch.randint(0, spec.megatron_args["vocab_size"], (size[0], size[1] + 1))
    is_original = (torch.arange(sequences) % 2 == 0).unsqueeze(1).expand(size).long()
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(size, dtype=torch.long),
        "position_ids": torch.arange(size[1]).expand(size).contiguous(),
        "is_original": is_original.contiguous(),
        "is_original_label": is_original.contiguous(),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: tensor.to(device) for name, tensor in batch.items()}


def our_step(spec: ModelSpec, stage: "Stage", batch: dict[str, Tensor]) -> "MegatronStep":
    """A MegatronStep of the trainer's model in `stage` with the stage's default losses."""
    from benchmarks.megatron_step import MegatronStep
    from moelpr.model.freezing import freeze
    from moelpr.model.loading import build_model
    from moelpr.model.losses import megatron_balance_coeff

    assert spec.moe is not None
    balance = megatron_balance_coeff(BALANCE_COEFF, spec.moe.topk, len(spec.moe.layers))
    losses = {"moe_aux_loss_coeff": balance} if stage == "stage1" else {"lpr_loss_coeff": LPR_COEFF}
    model = build_model(spec, **losses, **_machine_settings())
    freeze([model], stage)
    return MegatronStep(model, batch)


def plain_step(spec: ModelSpec, batch: dict[str, Tensor]) -> "MegatronStep":
    """A MegatronStep of plain Megatron MoE, everything trained, with the balance loss."""
    from benchmarks.megatron_step import MegatronStep
    from benchmarks.peers import plain_megatron
    from moelpr.model.losses import megatron_balance_coeff

    assert spec.moe is not None
    balance = megatron_balance_coeff(BALANCE_COEFF, spec.moe.topk, len(spec.moe.layers))
    model = plain_megatron.build(spec, moe_aux_loss_coeff=balance, **_machine_settings())
    return MegatronStep(model.to(batch["tokens"].device), batch, is_plain=True)


def _machine_settings() -> dict[str, object]:
    """What arguments.py would choose on a GPU; the defaults of build_model are those of a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {"bf16": True, "params_dtype": torch.bfloat16, "bias_activation_fusion": True}


def needed_flops(spec: ModelSpec, stage: str, sequences: int, original_rows: list[int]) -> float:
    """Floating-point operations a step cannot do without; multiply and add count as two.

    Per layer, with T tokens, hidden size H, FFN size F, K choices per token, of which R_0 rows went to the original
    expert and R = K T - R_0 to new ones:

        projections  2 T (H q + 2 H kv + q H)            q, kv: width of all query heads, of all key heads
        attention    2 T S q                             scores and values, the causal half of the S x S matrix
        router       2 T H E
        experts      6 (R_0 + R) H F                     gate, up and down

    Backward, a product costs once more for the gradient of its input where that depends on a trained weight (attention
    twice, for it has two inputs in each product) and once more for its weight where that is trained. Nothing below the
    first router trains, so the first layer's attention has no backward at all, its experts only what their weights
    need (stage 1: the down projection's input gradient of the new experts; stage 2: nothing, a gate weight's gradient
    is the product of the expert's output with the gradient above), and its router its weight. In the layers above,
    every input gradient is needed. New experts' weights train in stage 1, routers in both. Output layer:
    2 T H V forward and its input gradient. Embedding lookups, norms, softmax and the optimizer are no matrix products.
    """
    args, moe = spec.megatron_args, spec.moe
    assert moe is not None
    length, hidden, ffn = args["max_position_embeddings"], args["hidden_size"], args["ffn_hidden_size"]
    tokens = sequences * length
    query = args["num_attention_heads"] * args["kv_channels"]
    key = args["num_query_groups"] * args["kv_channels"]
    projections = 2 * tokens * (2 * hidden * query + 2 * hidden * key)
    attention = 2 * tokens * length * query
    router = 2 * tokens * hidden * moe.num_experts
    output = 2 * tokens * hidden * args["vocab_size"]
    total = 2.0 * output
    for layer, original in enumerate(original_rows):
        new = moe.topk * tokens - original
        row = 6 * hidden * ffn
        total += projections + attention + router + row * (original + new)
        trains_experts = stage == "stage1"
        total += router + (row * new if trains_experts else 0)  # weight gradients
        if layer == 0:
            total += 2 * hidden * ffn * new if trains_experts else 0
        else:
            total += projections + 2 * attention + router + row * (original + new)
    return total


def original_rows(step: "MegatronStep") -> list[int]:
    """Rows each layer's router sends to the original expert."""
    counts: list[int] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda module, inputs, output: counts.append(int(output[1][:, 0].sum())))
        for layer in step.model.decoder.layers
    ]
    step()
    for hook in hooks:
        hook.remove()
    return counts


def timed_s(work: Callable[[], object]) -> tuple[float, float]:
    """(wall time, time of this process on all cores) of one call in seconds, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, started_cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - started_cpu


def measure(spec: ModelSpec, sequences: int, rounds: int) -> dict:
    """Times, rates and ratios of all contenders, as written to JSON."""
    from benchmarks.peers.loop_moe import LoopStep

    torch.manual_seed(1)
    batch = random_batch(spec, sequences)
    tokens = batch["tokens"].numel()
    device = batch["tokens"].device.type
    ours = {stage: our_step(spec, stage, batch) for stage in STAGES}
    work: dict[str, Callable[[], object]] = {f"ours, {stage}": step for stage, step in ours.items()}
    work["plain Megatron"] = plain_step(spec, batch)
    work |= {f"Python loop, {stage}": LoopStep(spec, stage, batch) for stage in STAGES}
    flops = {
        stage: needed_flops(spec, stage, sequences, original_rows(step)) for stage, step in ours.items()
    }  # the first steps of ours, and the warm-up of the others:
    size = MATMUL_SIZE[device]
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, spec.dtype)) for _ in range(2))
    work["matmul"] = lambda: left @ right
    times: dict[str, list[float]] = {name: [] for name in work}
    cpu_times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, one in work.items():
            seconds, cpu_seconds = timed_s(one) if name != "matmul" else min(timed_s(one) for _ in range(5))
            if round_ > 0:
                times[name].append(seconds)
                cpu_times[name].append(cpu_seconds)

    def ratios(of: dict[str, list[float]]) -> dict[str, float]:
        """How many times faster the first is than the second."""
        return {
            name: statistics.median(b / a for a, b in zip(of[first], of[second], strict=True))
            for name, (first, second) in RATIOS.items()
        }

    matmul_rate = 2 * size**3 / statistics.median(times["matmul"])
    rows = {}
    for name in work:
        if name == "matmul":
            continue
        seconds = statistics.median(times[name])
        rows[name] = {"step_time_s": seconds, "tokens_per_s": tokens / seconds}
        for stage in (stage for stage in STAGES if name == f"ours, {stage}"):
            rows[name]["needed_gflop"] = flops[stage] / 1e9
            rows[name]["share_of_matmul_rate"] = statistics.median(
                flops[stage] / step / (2 * size**3 / product)
                for step, product in zip(times[name], times["matmul"], strict=True)
            )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": spec.dtype,
        "tokens_per_step": tokens,
        "shape": {name: spec.megatron_args[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
        | {"new_experts": spec.moe.num_new_experts if spec.moe else 0, "vocab_size": spec.megatron_args["vocab_size"]},
        "rounds": rounds,
        "matmul_gflop_per_s": matmul_rate / 1e9,
        "contenders": rows,
        "ratios": ratios(times),
        "ratios_of_cpu_time": ratios(cpu_times),
        "times_s": times,
        "cpu_times_s": cpu_times,
    }


def _print(result: dict) -> None:
    print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, {result['tokens_per_step']} tokens a step"
    )
    print(f"large matmul: {result['matmul_gflop_per_s']:,.0f} GFLOP/s; medians of {result['rounds']} rounds")
    print(f"{'step':<24}{'seconds':>10}{'tokens/s':>12}{'GFLOP needed':>15}{'of matmul rate':>17}")
    for name, row in result["contenders"].items():
        line = f"{name:<24}{row['step_time_s']:>10.3f}{row['tokens_per_s']:>12.1f}"
        if "needed_gflop" in row:
            line += f"{row['needed_gflop']:>15.1f}{row['share_of_matmul_rate']:>16.0%}"
        print(line)
    for name, value in result["ratios"].items():
        line = f"{name + ', tokens/s:':<40}{value:.2f}x"
        if result["device"] == "cpu":
            line += f"   ({result['ratios_of_cpu_time'][name]:.2f}x by CPU time, which other processes disturb less)"
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "hidden": 512, "ffn": 1536, "head": 64, "new-experts": 4, "topk": 2, "vocabulary": 4096}
    for name, default in {**sizes, "sequences": 4, "length": 256, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there and not to stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
