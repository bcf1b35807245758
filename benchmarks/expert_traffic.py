"""All-to-all bytes and time of an MoE layer under expert parallelism, against plain Megatron MoE.

    python benchmarks/expert_traffic.py [--json FILE]

One layer in the middle of a model (its input wants a gradient), forward and backward in training mode, on gloo CPU
ranks that this script starts with torchrun. Ours: LPRMoELayer with N new experts, frozen as in each stage. The peer:
Megatron's MoELayer with the all-to-all dispatcher and SequentialMLP, everything trained. Both take turns in every
round on inputs whose first columns are the router's logits, so that each token's choices are set by this script:

- uniform: every token chooses K of all experts at random.
- reviewed: half of the tokens are original-language text and choose expert 0 first, then K - 1 of the new experts; the
  other half choose as in uniform.

Bytes are counted where they are sent (torch.distributed.all_to_all_single), rows for the own rank left out. Two numbers
are given: the mean over ranks of bytes sent, and the busiest rank's, which is what an all-to-all waits for: of each
all-to-all the most that any rank sends or receives, summed over the all-to-alls of the step. The ratio that counts is
the mean's for uniform routing and the busiest rank's for reviewed routing; both are printed for both.

EP divides N in ours and would have to divide N + 1 in the peer, which never holds at once for EP > 1: the peer gets the
nearest number of experts that EP divides. Under uniform routing its bytes depend on K only, not on that number.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in benchmarks/ only

if TYPE_CHECKING:
    from moelpr.model_spec import ModelSpec
    from moelpr.stages import Stage

STAGES: tuple["Stage", ...] = ("stage1", "stage2")
PATTERNS = ("uniform", "reviewed")
WANTED = {"uniform": ("mean_sent", 0.9), "reviewed": ("busiest", 0.5)}


def main() -> None:
    arguments = _arguments()
    if arguments.worker is not None:
        _worker(arguments)
        return
    results = []
    for ep in arguments.expert_parallel:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            subprocess.run([*_torchrun(ep), *sys.argv[1:], "--worker", str(file)], check=True, env=_environment(ep))
            results += json.loads(file.read_text())
    _print(arguments, results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    else:
        print(json.dumps(results))


def _torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]


def _environment(ranks: int) -> dict[str, str]:
    """Each rank its share of the threads; threads that wait must not hold a core another rank needs."""
    threads = max(1, torch.get_num_threads() // ranks)
    return os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}


# ------------------------------------------------------------------------------------------------------- counting


@dataclass
class Traffic:
    """Bytes this rank exchanged with other ranks: one (phase, sent, received) per all-to-all, in order."""

    calls: list[tuple[str, int, int]] = field(default_factory=list)
    phase: str = "forward"

    def sent(self, phase: str) -> int:
        return sum(sent for of, sent, _ in self.calls if of == phase)

    def busier_directions(self) -> list[int]:
        """The larger of bytes sent and received in each all-to-all."""
        return [max(sent, received) for _, sent, received in self.calls]


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what all_to_all_single sends while the context lasts."""
    traffic, all_to_all = Traffic(), torch.distributed.all_to_all_single

    def counting(
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        **kwargs: Any,
    ) -> Any:
        own, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        sent = bytes_to_others(input, input_split_sizes, own, ranks)
        received = bytes_to_others(output, output_split_sizes, own, ranks)
        traffic.calls.append((traffic.phase, sent, received))
        return all_to_all(output, input, output_split_sizes, input_split_sizes, group=group, **kwargs)

    torch.distributed.all_to_all_single = counting  # type: ignore[assignment]
    try:
        yield traffic
    finally:
        torch.distributed.all_to_all_single = all_to_all


def bytes_to_others(tensor: Tensor, rows_by_rank: list[int] | None, own_rank: int, num_ranks: int) -> int:
    """Bytes of the rows of `tensor` that belong to other ranks; without split sizes all ranks have equal shares."""
    if rows_by_rank is None:
        rows_by_rank = [tensor.shape[0] // num_ranks] * num_ranks
    row_bytes = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
    return row_bytes * int(sum(rows_by_rank) - rows_by_rank[own_rank])


# -------------------------------------------------------------------------------------------------------- routing


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


def set_router(router: Any) -> None:
    """Expert e's logit becomes column e of the hidden state."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(*router.weight.shape))


def peer_experts(new_experts: int, ep: int) -> int:
    """The multiple of EP nearest to N + 1; of two equally near the smaller, which N experts' memory is nearer to."""
    below = (new_experts + 1) // ep * ep
    above = below + ep
    return below if below and new_experts + 1 - below <= above - new_experts - 1 else above


# -------------------------------------------------------------------------------------------------------- workers


def _worker(arguments: argparse.Namespace) -> None:
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()  # before Megatron is imported
    megatron_fixes.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    ep = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(1)
    results = [_compare(arguments, pattern, ep) for pattern in PATTERNS]
    if torch.distributed.get_rank() == 0:
        Path(arguments.worker).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class _Contender:
    """One MoE layer and this rank's input for it."""

    def __init__(self, layer: Any, num_experts: int, pattern: str, arguments: argparse.Namespace) -> None:
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(100 + rank)
        choices = chosen_experts(pattern, arguments.tokens, num_experts, arguments.topk, generator)
        hidden = impose(torch.randn(arguments.tokens, arguments.hidden, generator=generator), choices, num_experts)
        self.layer: Any = layer.train()
        self.hidden = hidden.unsqueeze(1).requires_grad_()
        set_router(layer.router)
        _, is_chosen = layer.router(self.hidden)
        assert torch.equal(is_chosen.float().sum(dim=1), torch.full((arguments.tokens,), float(arguments.topk)))
        assert is_chosen.gather(1, choices).all(), "the router does not choose what it was told"

    def __call__(self, traffic: Traffic | None = None) -> None:
        output = self.layer(self.hidden)[0]
        if traffic is not None:
            traffic.phase = "backward"
        output.backward(torch.ones_like(output))
        self.layer.zero_grad(set_to_none=True)
        self.hidden.grad = None


def _compare(arguments: argparse.Namespace, pattern: str, ep: int) -> dict:
    new, peers = arguments.new_experts, peer_experts(arguments.new_experts, ep)
    contenders = {
        f"ours, {stage}": _Contender(_our_layer(arguments, stage, ep), new + 1, pattern, arguments) for stage in STAGES
    }
    contenders["peer"] = _Contender(_plain_layer(arguments, peers, ep), peers, pattern, arguments)
    traffic = {name: _traffic_of(contender) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(arguments.rounds + 1):
        for name, contender in contenders.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            contender()
            torch.distributed.barrier()
            if round_ > 0:
                times[name].append(time.perf_counter() - started)

    def time_ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["peer"], strict=True))

    ours, peer = traffic["ours, stage1"], traffic["peer"]
    assert ours == traffic["ours, stage2"], "what is sent does not depend on the stage"
    which, wanted = WANTED[pattern]
    return {
        "expert_parallel": ep,
        "pattern": pattern,
        "new_experts": new,
        "peer_experts": peers,
        "tokens_per_rank": arguments.tokens,
        "hidden": arguments.hidden,
        "topk": arguments.topk,
        "ours_bytes": ours,
        "peer_bytes": peer,
        "ratio_mean_sent": ours["mean_sent"] / peer["mean_sent"],
        "ratio_busiest": ours["busiest"] / peer["busiest"],
        "compared": which,
        "wanted_ratio": wanted,
        "step_time_s": {name: statistics.median(seconds) for name, seconds in times.items()},
        "ratio_step_time_stage1": time_ratio("ours, stage1"),
        "ratio_step_time_stage2": time_ratio("ours, stage2"),
    }


def _our_layer(arguments: argparse.Namespace, stage: "Stage", ep: int) -> torch.nn.Module:
    from moelpr.model.freezing import freeze
    from moelpr.model.loading import build_model

    model = build_model(_spec(arguments, arguments.new_experts), expert_model_parallel_size=ep)
    freeze([model], stage)
    return model.decoder.layers[0].mlp


def _plain_layer(arguments: argparse.Namespace, num_experts: int, ep: int) -> torch.nn.Module:
    from benchmarks.peers import plain_megatron

    model = plain_megatron.build(_spec(arguments, num_experts - 1), expert_model_parallel_size=ep)
    return model.decoder.layers[0].mlp


def _spec(arguments: argparse.Namespace, new_experts: int) -> "ModelSpec":
    """A model of one layer, of which only the MoE layer is used."""
    from moelpr.model_spec import ModelSpec, MoeSpec

    shape = {
        "num_layers": 1, "hidden_size": arguments.hidden, "ffn_hidden_size": arguments.ffn, "num_attention_heads": 4,
        "num_query_groups": 4, "group_query_attention": False, "kv_channels": 8, "max_position_embeddings": 64,
        "position_embedding_type": "rope", "rotary_base": 10000, "normalization": "RMSNorm", "norm_epsilon": 1e-6,
        "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True, "qk_layernorm": False,
        "untie_embeddings_and_output_weights": False, "vocab_size": 128,
    }  # fmt: skip
    return ModelSpec("qwen2", "float32", shape, MoeSpec(new_experts, arguments.topk, (0,)))


def _traffic_of(contender: Callable[[Traffic], None]) -> dict[str, float]:
    """Bytes of one step over all ranks."""
    with counted_traffic() as traffic:
        contender(traffic)
    mine = torch.tensor([traffic.sent("forward"), traffic.sent("backward"), *traffic.busier_directions()])
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    by_rank = torch.stack(everyone).double()
    forward, backward = by_rank[:, 0].mean().item(), by_rank[:, 1].mean().item()
    return {
        "mean_sent": forward + backward,
        "mean_sent_forward": forward,
        "mean_sent_backward": backward,
        "busiest": by_rank[:, 2:].amax(dim=0).sum().item(),
    }


# --------------------------------------------------------------------------------------------------------- output


def _print(arguments: argparse.Namespace, results: list[dict]) -> None:
    print(
        f"N = {arguments.new_experts} new experts, top-{arguments.topk}, {arguments.tokens} tokens per rank, hidden "
        f"{arguments.hidden}, FFN {arguments.ffn}, fp32, gloo; medians of {arguments.rounds} rounds.\n"
        "MiB per rank and step, forward + backward. mean: sent, over ranks; busiest: the most any rank sends or "
        "receives, per all-to-all.\n"
        "The peer has the nearest number of experts to N + 1 that EP divides. * the ratio that is compared. Step times "
        "as shares of the peer's."
    )
    print(
        f"{'EP':<4}{'routing':<10}{'peer E':>7}{'ours mean':>16}{'peer mean':>16}{'ratio':>8}"
        f"{'ours busiest':>14}{'peer busiest':>14}{'ratio':>8}{'wanted':>8}{'time stage 1':>14}{'stage 2':>9}"
    )
    for row in results:
        marks = {which: "*" if row["compared"] == which else " " for which in ("mean_sent", "busiest")}
        sent = [
            f"{bytes_['mean_sent_forward'] / 2**20:.2f} + {bytes_['mean_sent_backward'] / 2**20:.2f}"
            for bytes_ in (row["ours_bytes"], row["peer_bytes"])
        ]
        print(
            f"{row['expert_parallel']:<4}{row['pattern']:<10}{row['peer_experts']:>7}{sent[0]:>16}{sent[1]:>16}"
            f"{row['ratio_mean_sent']:>7.2f}{marks['mean_sent']}"
            f"{row['ours_bytes']['busiest'] / 2**20:>14.2f}{row['peer_bytes']['busiest'] / 2**20:>14.2f}"
            f"{row['ratio_busiest']:>7.2f}{marks['busiest']}{row['wanted_ratio']:>8.2f}"
            f"{row['ratio_step_time_stage1']:>13.2f}x{row['ratio_step_time_stage2']:>8.2f}x"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"new-experts": 8, "topk": 2, "tokens": 1024, "hidden": 256, "ffn": 512, "rounds": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--expert-parallel", type=int, nargs="+", default=[2, 4], metavar="EP", help="default: 2 4")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there and not to stdout")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the file a rank started by this script writes to
    return parser.parse_args()


if __name__ == "__main__":
    main()
