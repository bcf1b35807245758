"""Which layouts a model and a cluster allow, and how they are written as flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moelpr.model_spec import ModelSpec

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run share the model. Sizes are Megatron's: tp · pp · dp ranks.

    tp: tensor parallel, always with sequence parallel.
    etp: tensor parallel inside experts, 1 or tp.
    recompute: selective recomputes the MoE layers (router, dispatch and experts), full whole layers.
    distributed_optimizer: optimizer state is divided over data-parallel ranks.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    recompute: Recompute = "none"
    distributed_optimizer: bool = True

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same new experts."""
        return self.world // (self.etp * self.ep * self.pp)

    def flags(self) -> list[str]:
        """What to write behind launch/stage1.sh or stage2.sh, as words."""
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--expert-model-parallel-size": self.ep,
        }
        words = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
        if self.tp > 1:
            words += ["--sequence-parallel", "--expert-tensor-parallel-size", str(self.etp)]
        if self.distributed_optimizer and max(self.dp, self.expert_dp) > 1:
            words.append("--use-distributed-optimizer")
        if self.recompute == "selective":
            words += ["--recompute-granularity", "selective", "--recompute-modules", "moe"]
        elif self.recompute == "full":
            words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return words


def legal_layouts(spec: ModelSpec, gpus: int, gpus_per_node: int, batch_unit: int, seq_length: int) -> Iterator[Layout]:
    """Every layout of `gpus` ranks that the trainer accepts for this model.

    Tensor parallelism stays inside a node, pipeline stages have equally many layers, the expert-parallel size divides
    N, expert tensor parallelism is 1 or TP.

    batch_unit: sequences of a step divided by those of a micro-batch; data-parallel ranks share them evenly.
    seq_length: tokens of a sequence; tensor-parallel ranks share them evenly.
    """
    assert spec.moe is not None
    shape = spec.megatron_args
    heads, groups, ffn = shape["num_attention_heads"], shape["num_query_groups"], shape["ffn_hidden_size"]
    for tp in _divisors(gpus):
        if leaves_node(tp, gpus, gpus_per_node) or heads % tp or ffn % tp or (groups % tp and tp % groups):
            continue
        if seq_length % tp:  # sequence parallelism
            continue
        for pp in _divisors(gpus // tp):
            dp = gpus // (tp * pp)
            if shape["num_layers"] % pp or batch_unit % dp:
                continue
            for ep in _divisors(spec.moe.num_new_experts):
                for etp in sorted({1, tp}):
                    if (gpus // pp) % (ep * etp):
                        continue
                    for recompute in RECOMPUTES:
                        yield Layout(tp, pp, ep, etp, dp, recompute)


def leaves_node(group: int, gpus: int, gpus_per_node: int) -> bool:
    """Whether groups of that many neighbouring ranks reach over the edge of a node."""
    return gpus > gpus_per_node and gpus_per_node % group != 0


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
