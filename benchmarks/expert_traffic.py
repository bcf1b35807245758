"""All-to-all bytes and time of an MoE layer under expert parallelism, against plain Megatron MoE.

    python -m benchmarks.expert_traffic [--json FILE]

Runs one layer in the middle of a model (its input requires a gradient) forward and backward, in training mode, on gloo
CPU ranks that this script starts. Ours: LPRMoELayer with N new experts, frozen as in each stage. The peer: Megatron's
MoELayer with the all-to-all dispatcher and SequentialMLP, everything trained. They take turns in every round on inputs
whose first columns are the router's logits, so this script sets each token's choices:

- uniform: every token chooses K of all experts at random.
- reviewed: half of the tokens are original-language text and choose expert 0 first, then K - 1 of the new experts; the
  other half choose as in uniform.

Bytes are counted where they are sent (torch.distributed.all_to_all_single), without rows for the own rank. Two numbers
are reported: the mean over ranks of bytes sent, and the busiest rank's, which an all-to-all waits for: the most that
any rank sends or receives in each all-to-all, summed over the all-to-alls of the step. The limits are for the ratio of
means (0.9, uniform routing) and for the ratio of busiest ranks (0.5, reviewed routing); both are printed for both.

EP divides N in ours and would have to divide N + 1 in the peer, which is impossible for both if EP > 1: the peer gets
the nearest number of experts that EP divides. Under uniform routing its bytes depend only on K, not on that number.
"""

import argparse
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks import common
from benchmarks.timing import median_s, take_turns, time_ratio, timed_s
from benchmarks.traffic import Traffic, counted_traffic

LIMITS = {"uniform": ("mean_sent", 0.9), "reviewed": ("busiest", 0.5)}
TABLE = """expert_parallel pattern peer_experts ratio_mean_sent ratio_busiest compared wanted_ratio
ratio_step_time_stage1 ratio_step_time_stage2""".split()


def main() -> None:
    parser = common.argument_parser(__doc__, new_experts=8, topk=2, hidden=256, ffn=512, rounds=7)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per rank")
    parser.add_argument("--expert-parallel", type=int, nargs="+", default=[2, 4], metavar="EP",
                        help="expert-parallel sizes, in ranks")  # fmt: skip
    common.add_json(parser)
    args = parser.parse_args()
    results = [result for ep in args.expert_parallel for result in run_ranks(args, ep)]
    common.print_table(results, *TABLE)
    run = ("expert_parallel", "pattern")
    kinds = ("ours_bytes", "peer_bytes")
    common.print_table([{**{key: row[key] for key in run}, "": kind, **row[kind]} for row in results for kind in kinds])
    common.write_json(results, args.json)


def chosen_experts(pattern: str, num_tokens: int, num_experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """[T, K] experts of each token, first choice first; in `reviewed` the first half of the tokens are original."""
    choices = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :topk]
    if pattern == "reviewed":
        half = num_tokens // 2
        new = torch.rand(half, num_experts - 1, generator=generator).argsort(dim=1)[:, : topk - 1] + 1
        choices[:half] = torch.cat([torch.zeros(half, 1, dtype=new.dtype), new], dim=1)
    return choices


def impose(hidden_TH: Tensor, choices_TK: Tensor, num_experts: int) -> Tensor:
    """Hidden states whose first E columns a router with identity weights reads as logits that choose `choices_TK`."""
    hidden_TH = hidden_TH.clone()
    topk = choices_TK.shape[1]
    logits = torch.full((len(hidden_TH), num_experts), -5.0)
    hidden_TH[:, :num_experts] = logits.scatter(1, choices_TK, torch.arange(topk, 0, -1.0).expand(len(hidden_TH), topk))
    return hidden_TH


def peer_experts(new_experts: int, ep: int) -> int:
    """The multiple of EP nearest to N + 1; the smaller of two equally near ones, as its memory is nearer to ours."""
    below = (new_experts + 1) // ep * ep
    above = below + ep
    return below if below and new_experts + 1 - below <= above - new_experts - 1 else above


def run_ranks(args: argparse.Namespace, ep: int) -> list[dict]:
    """Start `ep` ranks; results of each routing pattern."""
    threads = max(1, torch.get_num_threads() // ep)
    os.environ |= common.environment(OMP_NUM_THREADS=str(threads))  # inherited by the ranks
    config = LaunchConfig(1, 1, ep, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="traffic", max_restarts=0)
    return elastic_launch(config, rank_main)(args)[0]


def rank_main(args: argparse.Namespace) -> list[dict]:
    common.install_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    ep = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(1)
    results = [compare(args, pattern, ep) for pattern in LIMITS]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results


class _Contender:
    """One MoE layer and this rank's input for it."""

    def __init__(self, model: Any, num_experts: int, pattern: str, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
        choices = chosen_experts(pattern, args.tokens, num_experts, args.topk, generator)
        hidden = impose(torch.randn(args.tokens, args.hidden, generator=generator), choices, num_experts)
        self.layer: Any = model.decoder.layers[0].mlp.train()
        self.hidden = hidden.unsqueeze(1).requires_grad_()
        router = self.layer.router
        with torch.no_grad():
            router.weight.copy_(torch.eye(*router.weight.shape))  # logit e is column e of the hidden state
        _, is_chosen = router(self.hidden)
        assert torch.equal(is_chosen.float().sum(dim=1), torch.full((args.tokens,), float(args.topk)))
        assert is_chosen.gather(1, choices).all(), "the router does not make the imposed choices"

    def __call__(self, traffic: Traffic | None = None) -> None:
        output = self.layer(self.hidden)[0]
        if traffic is not None:
            traffic.phase = "backward"
        output.backward(torch.ones_like(output))
        self.layer.zero_grad(set_to_none=True)
        self.hidden.grad = None


def compare(args: argparse.Namespace, pattern: str, ep: int) -> dict:
    """Bytes and times of both stages and of the peer on `ep` ranks."""
    from benchmarks.baselines import plain_megatron
    from moelpr.model.freezing import freeze
    from moelpr.model.loading import build_model

    config = common.qwen2_config(1, args.hidden, args.ffn, vocabulary=128, length=64)
    new, peers = args.new_experts, peer_experts(args.new_experts, ep)
    contenders: dict[str, _Contender] = {}
    for stage in common.STAGES:
        model = build_model(common.model_spec(config, new, args.topk), expert_model_parallel_size=ep)
        freeze([model], stage)
        contenders[stage] = _Contender(model, new + 1, pattern, args)
    spec = common.model_spec(config, peers - 1, args.topk)
    plain = plain_megatron.build(spec, expert_model_parallel_size=ep)
    contenders["peer"] = _Contender(plain, peers, pattern, args)
    traffic = {name: traffic_of(contender) for name, contender in contenders.items()}

    def measure(contender: _Contender) -> tuple[float, float]:
        torch.distributed.barrier()
        return timed_s(lambda: (contender(), torch.distributed.barrier()))  # type: ignore[func-returns-value]

    times, _ = take_turns(contenders, args.rounds, measure)
    ours, peer = traffic["stage1"], traffic["peer"]
    assert ours == traffic["stage2"], "the bytes sent do not depend on the stage"
    compared, limit = LIMITS[pattern]
    medians = median_s(times)
    return {
        "expert_parallel": ep,
        "pattern": pattern,
        "peer_experts": peers,
        "tokens_per_rank": args.tokens,
        **{name: getattr(args, name) for name in ("new_experts", "hidden", "topk")},
        "ours_bytes": ours,
        "peer_bytes": peer,
        **{f"ratio_{count}": ours[count] / peer[count] for count in ("mean_sent", "busiest")},
        "compared": compared,
        "wanted_ratio": limit,
        "step_time_s": {name if name == "peer" else f"ours, {name}": median for name, median in medians.items()},
        **{f"ratio_step_time_{stage}": time_ratio(times, stage, "peer") for stage in common.STAGES},
    }


def traffic_of(contender: _Contender) -> dict[str, float]:
    """Bytes of one step over all ranks."""
    with counted_traffic() as traffic:
        contender(traffic)
    mine = torch.tensor([traffic.sent("forward"), traffic.sent("backward"), *traffic.busier_directions()])
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    by_rank = torch.stack(everyone).double()
    forward, backward = by_rank[:, :2].mean(dim=0).tolist()
    return {
        "mean_sent": forward + backward,
        "mean_sent_forward": forward,
        "mean_sent_backward": backward,
        "busiest": by_rank[:, 2:].amax(dim=0).sum().item(),
    }


if __name__ == "__main__":
    main()
