"""The layouts the planner considers: those that the trainer accepts, with tensor parallelism inside a node."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moelpr.layouts import Layout, divisors, layout_problems
from moelpr.model_spec import ModelSpec

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class PlannedLayout(Layout):
    """A layout together with the settings that trade memory for compute or communication.

    Attributes:
        recompute: what the backward pass recomputes: "selective" the MoE layers (router, dispatch and experts), "full"
            all layers.
        distributed_optimizer: whether optimizer state is divided over data-parallel ranks.
    """

    recompute: Recompute = "none"
    distributed_optimizer: bool = True

    def flags(self) -> list[str]:
        """The layout as command-line arguments of launch/stage1.sh or stage2.sh."""
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--expert-model-parallel-size": self.ep,
        }
        argv = [item for flag, size in sizes.items() if size > 1 for item in (flag, str(size))]
        if self.tp > 1:
            argv += ["--sequence-parallel", "--expert-tensor-parallel-size", str(self.etp)]
        if self.distributed_optimizer and max(self.dp, self.expert_dp) > 1:
            argv.append("--use-distributed-optimizer")
        if self.recompute == "selective":
            argv += ["--recompute-granularity", "selective", "--recompute-modules", "moe"]
        elif self.recompute == "full":
            argv += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return argv


def legal_layouts(
    spec: ModelSpec, gpus: int, gpus_per_node: int, seq_length: int, micro_batch_size: int, global_batch_size: int
) -> Iterator[PlannedLayout]:
    """Yield every layout of `gpus` ranks that the trainer accepts and whose tensor-parallel groups stay inside a node.

    Sequences have `seq_length` tokens; batch sizes are in sequences. Pipeline stages have equally many layers; context
    parallelism and virtual stages are not planned.
    """
    assert spec.moe is not None
    for tp in divisors(gpus):
        if leaves_node(tp, gpus, gpus_per_node):
            continue
        for pp in divisors(gpus // tp):
            for ep in divisors(spec.moe.num_new_experts):
                for etp in sorted({1, tp}):
                    layout = PlannedLayout(tp, pp, ep, etp, dp=gpus // (tp * pp))
                    if not any(layout_problems(layout, gpus, spec, seq_length, micro_batch_size, global_batch_size)):
                        yield from (PlannedLayout(tp, pp, ep, etp, layout.dp, recompute=each) for each in RECOMPUTES)


def leaves_node(group: int, gpus: int, gpus_per_node: int) -> bool:
    """Whether groups of that many neighboring ranks span several nodes."""
    return gpus > gpus_per_node and gpus_per_node % group != 0
