"""The plan of a stage: the layout and the micro-batch to use, with memory, time and disk.

    family, base = read_base(folder)
    spec = with_new_experts(family, base, NewExperts(8).with_default_copies(base))
    workload, cluster = Workload("stage1", 1024, 1, 512), Cluster.of(GPUS["h100-80"], 8)
    spec = most_experts(spec, workload, cluster)  # if N is to be chosen
    plan = plan_stage(spec, workload, cluster)
    plan.flags, plan.tokens_per_s, plan.checkpoints_bytes(24e9)

docs/design/planner.md explains how memory and time are computed, and the choices.
"""

import math
from dataclasses import dataclass

from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part, Stage
from moelpr.plan.candidates import Candidate, fitting, fitting_any_micro_batch
from moelpr.plan.gpus import Cluster
from moelpr.plan.memory import Workload, checkpoint_bytes, export_parameters, model_parts

# The lengths and the batch size of launch/recipes/paper-stage1.yaml and paper-stage2.yaml.
PAPER_SEQ_LENGTH: dict[Stage, int] = {"stage1": 1024, "stage2": 512}
PAPER_GLOBAL_BATCH_SIZE = 512
# The recipes save every 1,000 steps and keep every tenth checkpoint.
RETAIN_INTERVAL = 10_000


@dataclass(frozen=True)
class DiskBytes:
    """Sizes on disk: of a checkpoint, of one with trained tensors only, and of the exported model in bf16."""

    checkpoint: int
    checkpoint_of_what_is_trained: int
    bf16_export: int


@dataclass(frozen=True)
class StagePlan:
    """The layouts that fit, best first, for a model and a workload whose micro-batch may have been changed."""

    spec: ModelSpec
    workload: Workload
    cluster: Cluster
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def flags(self) -> list[str]:
        """Arguments of the stage's launcher."""
        return self.best.flags(self.workload)

    @property
    def memory_bytes(self) -> int:
        """The memory of the rank that needs the most."""
        return self.best.peak.total_bytes

    @property
    def tokens_per_s(self) -> float | None:
        """Per GPU."""
        return self.best.step_time.tokens_per_s(self.workload, self.cluster) if self.cluster.gpu else None

    @property
    def disk(self) -> DiskBytes:
        parts, workload = model_parts(self.spec), self.workload
        is_divided = self.best.layout.divides_optimizer
        full, trained = (
            checkpoint_bytes(parts, workload.trained, workload.dtype, is_divided, only) for only in (False, True)
        )
        return DiskBytes(full, trained, 2 * export_parameters(self.spec, parts))

    def checkpoints_bytes(self, tokens: float, retain_interval: int = RETAIN_INTERVAL) -> int:
        """The full checkpoints that are kept of a training on so many tokens, and the one being written."""
        steps = math.ceil(tokens / (self.workload.global_batch_size * self.workload.seq_length))
        return (steps // retain_interval + 2) * self.disk.checkpoint


def parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameters of a model's export, and those of them that a token uses."""
    parts, moe = model_parts(spec), spec.moe
    total = export_parameters(spec, parts)
    if moe is None:
        return total, total
    experts = sum(numel for (_, part), numel in parts.items() if part is Part.NEW_EXPERTS)
    return total, total - experts // moe.num_new_experts * (moe.num_experts - moe.topk)


def plan_stage(spec: ModelSpec, workload: Workload, cluster: Cluster, any_micro_batch: bool = True) -> StagePlan:
    """Plan a stage of a model on a cluster.

    Args:
        any_micro_batch: whether another micro-batch than the workload's is used if it is predicted to be faster.

    Raises:
        DoesNotFitError: no layout fits; it has the settings that would.
        UserError: no layout has that many GPUs.
    """
    if any_micro_batch:
        candidates, workload = fitting_any_micro_batch(spec, workload, cluster)
    else:
        candidates = fitting(spec, workload, cluster)
    return StagePlan(spec, workload, cluster, tuple(candidates))
