"""The layout of each stage on the project's hardware, with its time, memory and disk, by the planner."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from moelpr.base import machine
from moelpr.base.errors import UserError
from moelpr.model.families.families import read_base
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage
from moelpr.plan.candidates import most_experts
from moelpr.plan.gpus import GIB, GPUS, Cluster, cluster_here
from moelpr.plan.memory import Workload, export_parameters, model_parts
from moelpr.plan.stage_plan import StagePlan, plan_stage
from moelpr.project.reading import ProjectFile

_CPU_EXPERTS, _MOST_EXPERTS = 4, 8
_STEP_FLAGS = ("--global-batch-size", "--seq-length", "--stage1-experts")  # these are in the step already
# The planner's flags, and the keys that a user would change instead.
_KEYS = {
    "--num-new-experts": "experts.new",
    "--moe-every-k-layers": "experts.every_k_layers",
    "--gpus": "hardware.gpus",
    r"--gpu-memory-gib (\S+)": r"GPUs with \1 GiB",
}
_DEFAULT_MINUTES = 60.0


@dataclass(frozen=True)
class StageLayout:
    """How a stage is started, and what it needs.

    Attributes:
        flags: Arguments of its launcher that do not decide what it learns.
        tokens_per_s: Of all GPUs; None if it is not predicted.
        memory_gib: Memory of a node.
        plan: The planner's result; None on a CPU.
    """

    flags: list[str] = field(default_factory=list)
    nodes: int = 1
    gpus_per_node: int = 0
    tokens_per_s: float | None = None
    memory_gib: float = 4.0
    plan: StagePlan | None = None

    def minutes(self, tokens: float | None) -> float:
        return _DEFAULT_MINUTES if not tokens or not self.tokens_per_s else tokens / self.tokens_per_s / 60

    def disk_gib(self, tokens: float | None) -> float:
        return self.plan.cost(int(tokens or 1)).checkpoints_bytes / GIB if self.plan else 0.0


class Layouts:
    """The layouts of a project's stages.

    Args:
        config: Returns the folder with the base's config.json.
        settings: Returns the flags of a stage by name, of its recipe and of the project.
    """

    def __init__(
        self, file: ProjectFile, config: Callable[[], Path], settings: Callable[[str], dict[str, Any]]
    ) -> None:
        self._file, self._project, self._config_folder, self._settings = file, file.project, config, settings
        self.of = cache(self._of)

    @cached_property
    def cluster(self) -> Cluster | None:
        """The GPUs; None for a machine without any, whose CPU is used."""
        hardware = self._project.hardware
        if hardware.gpu == "none" or (hardware.gpu == "auto" and not machine.has_gpus()):
            return None
        if hardware.gpu == "auto":
            return cluster_here(hardware.gpus)
        if hardware.gpu not in GPUS:
            place = self._file.at("hardware", "gpu")
            raise UserError(f"{place}hardware.gpu {hardware.gpu} is unknown; use {', '.join(GPUS)}, auto, or none")
        return Cluster.of(GPUS[hardware.gpu], hardware.gpus or 1, hardware.gpus_per_node)

    @cached_property
    def num_new_experts(self) -> int:
        """N: what the project says, or the most that fit."""
        if self._project.experts.new:
            return self._project.experts.new
        if self.cluster is None:
            return _CPU_EXPERTS
        moe = most_experts(self._spec_of(_MOST_EXPERTS), self._workload("stage1"), self.cluster).moe
        assert moe is not None
        return moe.num_new_experts

    @property
    def export_gib(self) -> float:
        return 2 * export_parameters(self._spec, model_parts(self._spec)) / GIB if self.cluster else 0.0

    @property
    def evaluation_gpus(self) -> int:
        """GPUs that hold the export in bf16, with room for logits."""
        if self.cluster is None:
            return 0
        needed = math.ceil(1.3 * self.export_gib / self.cluster.gpu_memory_gib)
        return min(self.cluster.gpus_per_node, self.cluster.gpus, needed)

    def _of(self, stage: str) -> StageLayout:
        if self.cluster is None:
            return StageLayout()
        if stage == "lora":
            return StageLayout(gpus_per_node=1, memory_gib=2 * self.export_gib + 4)
        cluster, workload = self.cluster, self._workload(stage)
        is_free = "micro-batch-size" not in self._project.steps.get(stage, {})
        try:
            plan = plan_stage(self._spec, workload, cluster, enlarge=is_free)
        except UserError as error:
            message = str(error)
            for flag, key in _KEYS.items():
                message = re.sub(flag, key, message)
            raise UserError(f"{self._file.at('hardware')}{stage}: {message}") from None
        nodes = max(1, cluster.gpus // cluster.gpus_per_node)
        flags = plan.flags
        for flag in [flag for flag in _STEP_FLAGS if flag in flags]:
            place = flags.index(flag)
            del flags[place : place + 2]
        speed = plan.tokens_per_s and plan.tokens_per_s * cluster.gpus
        memory = (2 * plan.memory_bytes + plan.best.peak.host_bytes) / GIB * cluster.gpus / nodes
        return StageLayout(flags, nodes, cluster.gpus // nodes, speed, memory, plan)

    def _workload(self, stage: str) -> Workload:
        settings = self._settings(stage)
        length, batch = (int(settings[name]) for name in ("seq-length", "global-batch-size"))
        return Workload(
            cast(Stage, stage),
            length,
            int(settings.get("micro-batch-size", 1)),
            batch,
            stage1_experts=settings.get("stage1-experts", "all"),
            optimizer_cpu_offload=settings.get("optimizer-cpu-offload", False),
        )

    @cached_property
    def _spec(self) -> ModelSpec:
        return (
            self._spec_of(self.num_new_experts)
            if self._project.method == "moe-lpr"
            else read_base(self._config_folder())[1]
        )

    def _spec_of(self, num_new_experts: int) -> ModelSpec:
        experts = self._project.experts
        family, base = read_base(self._config_folder())
        new = NewExperts(num_new_experts, experts.topk, experts.copies, moe_every_k_layers=experts.every_k_layers)
        spec = with_new_experts(family, base, new.with_default_copies(base))
        if vocabulary := self._project.vocabulary:
            spec = spec.with_new_tokens(spec.megatron_args["vocab_size"], vocabulary.new_tokens)
        return spec
