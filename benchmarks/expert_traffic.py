"""All-to-all bytes and time of an MoE layer under expert parallelism, against plain Megatron MoE.

    python -m benchmarks.expert_traffic [--json FILE]

Runs one layer in the middle of a model (its input requires a gradient) forward and backward, in training mode, on ranks
that this script starts: one per GPU, in bf16, or without a GPU on gloo CPU ranks. Ours: LPRMoELayer with C copies of
the dense FFN and N new experts, frozen as in each stage. The peer: Megatron's MoELayer with the all-to-all dispatcher
and SequentialMLP, everything trained; a copy is an expert like any other. They take turns in every round, and their
routers are made to choose:

- uniform: every token chooses K of the E = C + N places at random, and K of the peer's experts, of which there are the
  multiple of EP nearest to E. Their number does not change the peer's bytes.
- reviewed: what the routers of the demo's reviewed model chose on held-out text, as many tokens of each language and
  layer. N, C and K are this model's. The peer makes the same choices; its rank p mod EP holds place p, so that copies
  are on different ranks, and experts that nobody chooses fill the ranks up. Left out with `--demo none`.

Bytes are counted where they are sent (torch.distributed.all_to_all_single), without rows for the own rank. Two numbers
are reported: the mean over ranks of bytes sent, and the busiest rank's, which an all-to-all waits for: the most that
any rank sends or receives in each all-to-all, summed over the all-to-alls of the step. The limits are for the ratio of
means (0.82, uniform routing) and for the ratio of busiest ranks (reviewed routing: 0.4 with 2 ranks, 0.3 with more);
both are printed for both. The layer's time should be at most the peer's.
"""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.benchmark import Timer

from benchmarks import common
from benchmarks.imposed_routing import impose, recorded_routing, uniform_choices
from benchmarks.timing import Turns, median_s, time_ratio
from moelpr.base.command import run_command
from moelpr.model.megatron import cpu

COMPARED = {"uniform": "mean_sent", "reviewed": "busiest"}
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}  # as the launcher sets them on CPUs
TABLE = """expert_parallel pattern peer_experts ratio_mean_sent ratio_busiest compared wanted_ratio
ratio_step_time_stage1 ratio_step_time_stage2""".split()


def main() -> None:
    parser = common.argument_parser(__doc__, new_experts=8, original_copies=2, topk=2, hidden=256, ffn=512, rounds=7)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per rank")
    sizes: Any = {"type": int, "nargs": "+", "default": [2, 4], "metavar": "EP"}
    parser.add_argument("--expert-parallel", **sizes, help="expert-parallel sizes, in ranks")
    common.add_demo(parser)
    common.add_json(parser)
    args = parser.parse_args()
    args.reviewed = recorded_routing(args.demo, "stage2") if args.demo else None
    results = [result for ep in args.expert_parallel for result in run_ranks(args, ep)]
    common.print_table(results, *TABLE)
    run = ("expert_parallel", "pattern")
    kinds = ("ours_bytes", "peer_bytes")
    common.print_table([{**{key: row[key] for key in run}, "": kind, **row[kind]} for row in results for kind in kinds])
    common.write_json(results, args.json)


def limit(pattern: str, ep: int) -> float:
    """The largest ratio of bytes that is wanted."""
    return 0.82 if pattern == "uniform" else 0.4 if ep == 2 else 0.3


def nearest_multiple(num_experts: int, ep: int) -> int:
    """The multiple of EP nearest to E; the smaller of two equally near ones, as its memory is nearer to ours."""
    below = num_experts // ep * ep
    above = below + ep
    return below if below and num_experts - below <= above - num_experts else above


def experts_of(places: Tensor, num_experts: int, ep: int) -> Tensor:
    """The peer's experts for places: p on rank p mod EP, in Megatron's order, which numbers them rank by rank."""
    return places % ep * (num_experts // ep) + places // ep


def run_ranks(args: argparse.Namespace, ep: int) -> list[dict]:
    """Start `ep` ranks; results of each routing pattern."""
    threads = max(1, torch.get_num_threads() // ep)
    os.environ |= common.environment(OMP_NUM_THREADS=str(threads), **MALLOC)  # inherited by the ranks
    config = LaunchConfig(1, 1, ep, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="traffic", max_restarts=0)
    return elastic_launch(config, rank_main)(args)[0]


def rank_main(args: argparse.Namespace) -> list[dict]:
    common.install_megatron()
    from moelpr.model.megatron import bootstrap

    bootstrap.connect_ranks()
    ep = torch.distributed.get_world_size()
    with bootstrap.parallel_groups(seed=1, expert_model_parallel_size=ep):
        results = [compare(args, pattern, ep) for pattern in COMPARED if args.reviewed or pattern == "uniform"]
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


def choices_of(args: argparse.Namespace, pattern: str, ep: int) -> tuple[dict[str, Any], Tensor, int, Tensor]:
    """(experts of ours, this rank's choices of places; number of the peer's experts, its choices)."""
    rank = torch.distributed.get_rank()
    if pattern == "reviewed":
        experts, places = args.reviewed.experts, args.reviewed.part(rank, args.tokens)
        peers = math.ceil((experts["new_experts"] + experts["original_copies"]) / ep) * ep
        return experts, places, peers, experts_of(places, peers, ep)
    experts = {name: getattr(args, name) for name in ("new_experts", "original_copies", "topk")}
    num_places = args.new_experts + args.original_copies
    peers, generator = nearest_multiple(num_places, ep), torch.Generator().manual_seed(100 + rank)
    places, chosen = (uniform_choices(args.tokens, count, args.topk, generator) for count in (num_places, peers))
    return experts, places, peers, chosen


def compare(args: argparse.Namespace, pattern: str, ep: int) -> dict:
    """Bytes and times of both stages and of the peer on `ep` ranks."""
    from benchmarks.baselines import plain_megatron
    from moelpr.model.layers.freezing import freeze
    from moelpr.model.layers.loading import build_model

    experts, places, peers, chosen = choices_of(args, pattern, ep)
    config = common.qwen2_config(1, args.hidden, args.ffn, vocabulary=128, length=64)
    settings: dict[str, Any] = {"expert_model_parallel_size": ep}
    settings |= {} if cpu.is_needed() else {"bf16": True, "params_dtype": torch.bfloat16}
    contenders: dict[str, _Contender] = {}
    for stage in common.STAGES:
        model = build_model(common.model_spec(config, **experts), **settings)
        freeze([model], stage)
        contenders[stage] = _Contender(model, places, args.hidden)
    plain = plain_megatron.build(common.model_spec(config, peers - 1, experts["topk"]), **settings)
    contenders["peer"] = _Contender(plain, chosen, args.hidden)
    traffic = {name: traffic_of(contender) for name, contender in contenders.items()}

    def measure(contender: _Contender) -> float:
        """The time of one call, after as many on every rank to warm up."""
        barrier = torch.distributed.barrier
        names = {"contender": contender, "barrier": barrier}
        return Timer("contender(); barrier()", "barrier()", globals=names, num_threads=threads).timeit(1).median

    threads = torch.get_num_threads()
    times = Turns(args.rounds).take(contenders, measure)
    ours, peer = traffic["stage1"], traffic["peer"]
    assert ours == traffic["stage2"], "the bytes sent do not depend on the stage"
    medians = median_s(times)
    return {
        "device": "cpu" if cpu.is_needed() else torch.cuda.get_device_name(),
        "expert_parallel": ep,
        "pattern": pattern,
        "peer_experts": peers,
        "tokens_per_rank": args.tokens,
        "hidden": args.hidden,
        **experts,
        "ours_bytes": ours,
        "peer_bytes": peer,
        **{f"ratio_{count}": ours[count] / peer[count] for count in ("mean_sent", "busiest")},
        "compared": COMPARED[pattern],
        "wanted_ratio": limit(pattern, ep),
        "step_time_s": {name if name == "peer" else f"ours, {name}": median for name, median in medians.items()},
        **{f"ratio_step_time_{stage}": time_ratio(times, stage, "peer") for stage in common.STAGES},
    }


def traffic_of(contender: _Contender) -> dict[str, float]:
    """Bytes of one step over all ranks."""
    with counted_traffic() as traffic:
        contender()
    mine = torch.tensor(traffic, device=torch.cuda.current_device())
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    by_rank = torch.stack(everyone).double()  # [ranks, all-to-alls, sent and received]
    return {
        "mean_sent": by_rank[..., 0].sum(dim=1).mean().item(),
        "busiest": by_rank.amax(dim=(0, 2)).sum().item(),
    }


@contextmanager
def counted_traffic() -> Iterator[list[tuple[int, int]]]:
    """Count the bytes (sent, received) of each torch.distributed.all_to_all_single inside the context."""
    traffic: list[tuple[int, int]] = []
    all_to_all = torch.distributed.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        names = ("output", "input", "output_split_sizes", "input_split_sizes", "group")
        call = dict(zip(names, args, strict=False)) | kwargs
        group = call.get("group")
        own, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        sent, received = (
            bytes_to_others(call[name], call.get(f"{name}_split_sizes"), own, ranks) for name in ("input", "output")
        )
        traffic.append((sent, received))
        return all_to_all(*args, **kwargs)

    torch.distributed.all_to_all_single = counting
    try:
        yield traffic
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
