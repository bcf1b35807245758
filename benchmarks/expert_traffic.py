"""All-to-all bytes and time of an MoE layer under expert parallelism, against plain Megatron MoE.

    python -m benchmarks.expert_traffic [--json FILE]

Runs one layer in the middle of a model (its input requires a gradient) forward and backward, in training mode, on ranks
that this script starts: one per GPU, in bf16, or without a GPU on gloo CPU ranks. Ours: LPRMoELayer with C copies of
the dense FFN and N new experts, frozen as in each stage. The peer: Megatron's MoELayer with the all-to-all dispatcher
and SequentialMLP, everything trained; a copy is an expert like any other. They take turns in every round. Routers are
made to choose K of the E = C + N places at random, and K of the peer's experts, of which there are the multiple of EP
nearest to E. Their number does not change the peer's bytes.

Bytes are counted where they are sent (torch.distributed.all_to_all_single), without rows for the own rank, as mean over
ranks. They should be at most 0.82 of the peer's, and the layer's time at most the peer's.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.benchmark import Timer

from benchmarks import common
from benchmarks.imposed_routing import impose, uniform_choices
from benchmarks.timing import Turns, median_s, time_ratio
from moelpr.base.command import run_command
from moelpr.model.megatron import cpu

LIMIT = 0.82  # ratio of bytes, at most
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}  # as the launcher sets them on CPUs


def main() -> None:
    parser = common.argument_parser(__doc__, new_experts=8, original_copies=2, topk=2, hidden=256, ffn=512, rounds=7)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per rank")
    sizes: Any = {"type": int, "nargs": "+", "default": [2, 4], "metavar": "EP"}
    parser.add_argument("--expert-parallel", **sizes, help="expert-parallel sizes, in ranks")
    args = parser.parse_args()
    results = [run_ranks(args, ep) for ep in args.expert_parallel]
    common.print_table(results)
    common.write_json(results, args.json)


def nearest_multiple(num_experts: int, ep: int) -> int:
    """The multiple of EP nearest to E; the smaller of two equally near ones, as its memory is nearer to ours."""
    below = num_experts // ep * ep
    above = below + ep
    return below if below and num_experts - below <= above - num_experts else above


def run_ranks(args: argparse.Namespace, ep: int) -> dict:
    """Start `ep` ranks; their results."""
    threads = max(1, torch.get_num_threads() // ep)
    os.environ |= common.environment(OMP_NUM_THREADS=str(threads), **MALLOC)  # inherited by the ranks
    config = LaunchConfig(1, 1, ep, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="traffic", max_restarts=0)
    return elastic_launch(config, rank_main)(args)[0]


def rank_main(args: argparse.Namespace) -> dict:
    common.install_megatron()
    from moelpr.model.megatron import bootstrap

    bootstrap.connect_ranks()
    ep = torch.distributed.get_world_size()
    with bootstrap.parallel_groups(seed=1, expert_model_parallel_size=ep):
        results = compare(args, ep)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results


class _Contender:
    """One MoE layer and this rank's input for it."""

    def __init__(self, model: Any, choices_TK: Tensor, hidden: int) -> None:
        self.layer: Any = model.decoder.layers[0].mlp.train()
        device, dtype = torch.cuda.current_device(), model.config.params_dtype
        choices_TK = choices_TK.to(device)
        self.hidden = torch.randn(len(choices_TK), 1, hidden, device=device, dtype=dtype, requires_grad=True)
        impose(self.layer.router, choices_TK)
        _, is_chosen = self.layer.router(self.hidden)
        assert is_chosen.gather(1, choices_TK).all(), "the router does not make the imposed choices"
        assert is_chosen.sum() == choices_TK.numel()

    def __call__(self) -> None:
        output = self.layer(self.hidden)[0]
        output.backward(torch.ones_like(output))
        self.layer.zero_grad(set_to_none=True)
        self.hidden.grad = None


def compare(args: argparse.Namespace, ep: int) -> dict:
    """Bytes and times of both stages and of the peer on `ep` ranks."""
    from benchmarks.baselines import plain_megatron
    from moelpr.model.layers.freezing import freeze
    from moelpr.model.layers.loading import build_model

    experts = {name: getattr(args, name) for name in ("new_experts", "original_copies", "topk")}
    num_places, generator = args.new_experts + args.original_copies, torch.Generator()
    generator.manual_seed(100 + torch.distributed.get_rank())
    peers = nearest_multiple(num_places, ep)
    places, chosen = (uniform_choices(args.tokens, count, args.topk, generator) for count in (num_places, peers))
    config = common.qwen2_config(1, args.hidden, args.ffn, vocabulary=128, length=64)
    settings: dict[str, Any] = {"expert_model_parallel_size": ep}
    settings |= {} if cpu.is_needed() else {"bf16": True, "params_dtype": torch.bfloat16}
    contenders: dict[str, _Contender] = {}
    for stage in common.STAGES:
        model = build_model(common.model_spec(config, **experts), **settings)
        freeze([model], stage)
        contenders[stage] = _Contender(model, places, args.hidden)
    plain = plain_megatron.build(common.model_spec(config, peers - 1, args.topk), **settings)
    contenders["peer"] = _Contender(plain, chosen, args.hidden)
    sent = {}
    for name, contender in contenders.items():
        with counted_bytes() as counted:
            contender()
        total = torch.tensor(sum(counted), dtype=torch.double, device=torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        sent[name] = total.item() / ep

    def measure(contender: _Contender) -> float:
        """The time of one call, after as many on every rank to warm up."""
        names = {"contender": contender, "barrier": torch.distributed.barrier}
        return Timer("contender(); barrier()", "barrier()", globals=names, num_threads=threads).timeit(1).median

    threads = torch.get_num_threads()
    times = Turns(args.rounds).take(contenders, measure)
    assert sent["stage1"] == sent["stage2"], "the bytes sent do not depend on the stage"
    return {
        "device": "cpu" if cpu.is_needed() else torch.cuda.get_device_name(),
        "expert_parallel": ep,
        "peer_experts": peers,
        "tokens_per_rank": args.tokens,
        "hidden": args.hidden,
        **experts,
        "ours_bytes": sent["stage1"],
        "peer_bytes": sent["peer"],
        "ratio_mean_sent": sent["stage1"] / sent["peer"],
        "wanted_ratio": LIMIT,
        "step_time_s": median_s(times),
        **{f"ratio_step_time_{stage}": time_ratio(times, stage, "peer") for stage in common.STAGES},
    }


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes that each torch.distributed.all_to_all_single inside the context sends to other ranks."""
    sent: list[int] = []
    all_to_all = torch.distributed.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        names = ("output", "input", "output_split_sizes", "input_split_sizes", "group")
        call = dict(zip(names, args, strict=False)) | kwargs
        group = call.get("group")
        own, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        sent.append(bytes_to_others(call["input"], call.get("input_split_sizes"), own, ranks))
        return all_to_all(*args, **kwargs)

    torch.distributed.all_to_all_single = counting
    try:
        yield sent
    finally:
        torch.distributed.all_to_all_single = all_to_all


def bytes_to_others(tensor: Tensor, rows_by_rank: list[int] | None, own_rank: int, num_ranks: int) -> int:
    """Bytes of the rows of `tensor` for other ranks; without split sizes all ranks have equal shares."""
    if rows_by_rank is None:
        rows_by_rank = [tensor.shape[0] // num_ranks] * num_ranks
    row_bytes = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
    return row_bytes * int(sum(rows_by_rank) - rows_by_rank[own_rank])


if __name__ == "__main__":
    run_command(main)
