"""The layout of each stage on the project's hardware, with its time, memory and disk, by the planner."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from moelpr.base import machine
from moelpr.base.errors import UserError, did_you_mean
from moelpr.model.families.families import FREE_ARGS, Family, check_settings, read_base
from moelpr.model.families.hub import config_folder
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.families.tables import pieces
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part, Stage
from moelpr.plan.candidates import MOST_EXPERTS, DoesNotFitError, most_experts, numbers_of_experts, with_num_experts
from moelpr.plan.gpus import GIB, GPUS, Cluster, cluster_here
from moelpr.plan.layouts import SIZES, Layout, PlannedLayout, layout_problems
from moelpr.plan.memory import CPU, PROCESS_BYTES, Workload, export_parameters, model_parts, stage_memories
from moelpr.plan.stage_plan import RETAIN_INTERVAL, StagePlan, plan_stage
from moelpr.project.file import ProjectFile
from moelpr.train.launcher import sharing_gpus

_CPU_EXPERTS = 4
# The model of a review that follows a second FFN: as many places of the new FFN as a token chooses.
TWINS: dict[str, Any] = {"num_new_experts": 2, "topk": 2, "original_copies": 2}
# The planner's flags, and the keys that a user would change instead.
_KEYS = {
    "--num-new-experts": "experts.new",
    "--original-copies": "experts.copies",
    "--topk": "experts.topk",
    "--moe-every-k-layers": "experts.every_k_layers",
    "--gpus-per-node": "hardware.gpus_per_node",
    "--gpus": "hardware.gpus",
    r"--gpu-memory-gib (\S+)": r"GPUs with \1 GiB",
    "--(optimizer-cpu-offload|bf16-moments)": r"steps.STAGE.\1: true",
    "--(?=[a-z])": "steps.STAGE.",
    r"((?:experts|steps|hardware)\.[\w.-]+) (?=\d)": r"\1: ",
}


@dataclass(frozen=True)
class StageLayout:
    """How a stage is started, and what it needs."""

    memory_gib: float  # memory of a node
    flags: list[str] = field(default_factory=list)  # arguments of its launcher that do not decide what it learns
    nodes: int = 1
    gpus_per_node: int = 0
    tokens_per_s: float | None = None  # tokens of all GPUs; None if it is not predicted
    plan: StagePlan | None = None  # the planner's result; None on a CPU
    retain_interval: int = RETAIN_INTERVAL

    def minutes(self, tokens: float | None) -> float | None:
        return tokens / self.tokens_per_s / 60 if tokens and self.tokens_per_s else None

    def disk_gib(self, tokens: float | None) -> float:
        return self.plan.checkpoints_bytes(tokens or 1, self.retain_interval) / GIB if self.plan else 0.0


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
        self.counts_cpu_memory = True  # for which the shape of the base is read, in a second

    @cached_property
    def cluster(self) -> Cluster | None:
        """The GPUs; None for a machine without any, whose CPU is used."""
        hardware = self._project.hardware
        if hardware.gpu == "none" or (hardware.gpu == "auto" and not machine.has_gpus()):
            return None
        with self._named_keys():
            if hardware.gpu == "auto":
                return cluster_here(hardware.gpus)
            if hardware.gpu in GPUS:
                return Cluster.of(GPUS[hardware.gpu], hardware.gpus or 1, hardware.gpus_per_node)
            hint = did_you_mean(hardware.gpu.lower(), GPUS, f"use {', '.join(GPUS)}, auto, or none")
            raise UserError(f"hardware.gpu {hardware.gpu} is unknown; {hint}")

    @cached_property
    def num_new_experts(self) -> int:
        """N: what the project says, or the most that fit."""
        if self._project.experts.new or self._project.experts.topk == 1:
            of_languages = self._project.experts.per_language and len(self._project.languages.expanded)
            return of_languages or self._project.experts.new or 1
        if self.cluster is None:
            return _CPU_EXPERTS
        with self._named_keys("stage1"):
            workload = self._workload("stage1")
            if self._is_micro_batch_free("stage1"):
                workload = replace(workload, micro_batch_size=1)
            spec = most_experts(self._spec_of(MOST_EXPERTS), workload, self.cluster)
        assert spec.moe is not None
        return spec.moe.num_new_experts

    def other_numbers(self) -> Iterator[tuple[int, StagePlan]]:
        """Plans of stage 1 with the next smaller and the next larger number of new experts, as far as they fit."""
        assert self.cluster is not None
        numbers = sorted({*numbers_of_experts(self._spec, self.cluster), self.num_new_experts})
        place = numbers.index(self.num_new_experts)
        for number in numbers[max(place - 1, 0) : place] + numbers[place + 1 : place + 2]:
            with contextlib.suppress(DoesNotFitError):
                yield number, self._plan("stage1", with_num_experts(self._spec, number))

    def of_one_choice(self) -> Iterator[tuple[ModelSpec, StagePlan]]:
        """The model in which a token uses one expert, and the plan of its training, if the base allows it."""
        family, base = self._base
        if base.moe is None and not self._project.vocabulary:
            with contextlib.suppress(DoesNotFitError):
                yield with_new_experts(family, base, NewExperts(1, topk=1)), self._plan("ffn", base)

    def check_chat(self) -> None:
        """Raise a `UserError` if there is a chat model, and it has another shape than the base, or experts."""
        if (name := self._project.chat) is None:
            return
        try:
            (_, base), (_, chat) = self._base, read_base(config_folder(Path(name)))
            check_settings(
                Path(self._project.model), base, Path(name), chat, "name the base's own chat model", FREE_ARGS
            )
            if base.moe or chat.moe:
                raise UserError("base and chat model must be dense, got an MoE; remove it")
        except UserError as error:
            raise UserError(f"{self._file.at('chat')}chat: {error}") from None

    @property
    def _is_known(self) -> bool:
        """Whether the base's shape is there; without GPUs, the Hub is not asked for it here."""
        if self.cluster is not None:
            return True
        return self.counts_cpu_memory and ("_base" in vars(self) or Path(self._project.model).exists())

    @property
    def export_gib(self) -> float:
        """The export in 16 bits."""
        return 2 * export_parameters(self.result, model_parts(self.result)) / GIB if self._is_known else 0.0

    @property
    def evaluation_gpus(self) -> int:
        """GPUs that hold the export in bf16, with room for logits."""
        if self.cluster is None:
            return 0
        needed = math.ceil(1.3 * self.export_gib / self.cluster.gpu_memory_gib)
        return min(self.cluster.gpus_per_node, self.cluster.gpus, needed)

    def _of(self, stage: str) -> StageLayout:
        if not self._is_known:
            return StageLayout(memory_gib=4)
        cluster, spec = self.cluster, self._spec
        if stage == "lora":
            own = self._project.steps.get(stage, {})
            given = {flag: value[0] if isinstance(value, list) else value for flag, value in own.items() if value}
            sizes = {"global-batch-size": 512, "micro-batch-size": 8} | given
            batch, micro = (int(str(sizes[name])) for name in ("global-batch-size", "micro-batch-size"))
            if batch % micro:
                raise UserError(f"steps.lora: global-batch-size {batch} must be a multiple of micro-batch-size {micro}")
            gpus = cluster and sharing_gpus(min(cluster.gpus, cluster.gpus_per_node), batch // micro)
            return StageLayout(gpus_per_node=gpus or 0, memory_gib=2 * self.export_gib + 4)
        if stage == "stage2" and self._project.way == "auto":
            spec = with_new_experts(*self._base, NewExperts(**TWINS))
        with self._named_keys(stage):
            if cluster is None:  # one process, in fp32
                workload = replace(self._workload(stage), dtype="fp32", kernels=CPU)
                for problem in layout_problems(Layout(), 1, spec, *workload.lengths, torch_grouped_gemm=False):
                    raise UserError(problem)
                [rank] = stage_memories(spec, model_parts(spec), PlannedLayout(), workload)
                return StageLayout(memory_gib=(rank.total_bytes + rank.host_bytes + PROCESS_BYTES) / GIB)
            plan = self._plan(stage, spec)
        nodes = max(1, cluster.gpus // cluster.gpus_per_node)
        refused = {f"--{flag}" for flag, value in self._project.steps.get(stage, {}).items() if value is False}
        flags = [flag for flag in plan.best.speed_flags(plan.workload) if flag.partition("=")[0] not in refused]
        speed = plan.tokens_per_s and plan.tokens_per_s * cluster.gpus
        rank = plan.best.peak
        saved = 2 * (rank.parameter_bytes + rank.optimizer_bytes)  # copies of what a checkpoint has
        memory = 4 + (saved + rank.host_bytes) / GIB * cluster.gpus / nodes
        retain_interval = self._settings(stage).get("save-retain-interval") or RETAIN_INTERVAL
        return StageLayout(memory, flags, nodes, cluster.gpus // nodes, speed, plan, retain_interval)

    def _plan(self, stage: str, spec: ModelSpec) -> StagePlan:
        assert self.cluster is not None
        return plan_stage(spec, self._workload(stage), self.cluster, self._is_micro_batch_free(stage))

    def _is_micro_batch_free(self, stage: str) -> bool:
        return "micro-batch-size" not in self._project.steps.get(stage, {})

    @contextlib.contextmanager
    def _named_keys(self, stage: str = "", key: str = "hardware") -> Iterator[None]:
        """Name the file and its keys in errors of the planner, which name its flags."""
        try:
            yield
        except UserError as error:
            message = f"{stage}: {error}" if stage else str(error)
            if isinstance(error, DoesNotFitError) and stage == "stage1":
                for _, its in self.of_one_choice():
                    other = f"method: second-ffn (fits in {its.memory_bytes / GIB:.1f} GiB)"
                    message = message.replace("; use ", f"; use {other}, ")
            if isinstance(error, DoesNotFitError) and stage == "ffn" and self.cluster:
                weights = 2 * export_parameters(self._spec, model_parts(self._spec)) / GIB
                if weights < self.cluster.gpu_memory_gib:
                    message += f", or method: second-ffn with experts: {{rank: 64}} (the base has {weights:.1f} GiB)"
            for flag, named in _KEYS.items():
                message = re.sub(flag, named.replace("STAGE", stage), message)
            given = re.findall(r"\b(?:steps|experts|hardware)\.[\w.-]+\w", message)
            place = next((one for name in given if (one := tuple(name.split("."))) in self._file.lines), (key,))
            raise UserError(f"{self._file.at(*place)}{message}") from None

    def _workload(self, stage: str) -> Workload:
        settings = self._settings(stage)
        if missing := {"seq-length", "global-batch-size"} - settings.keys():
            raise UserError(f"steps.{stage}.{min(missing)} is missing, since its recipe has none; add it")
        length, batch = (int(settings[name]) for name in ("seq-length", "global-batch-size"))
        own: dict[str, Any] = {**self._project.steps.get(stage, {})}
        return Workload(
            cast(Stage, stage),
            length,
            int(settings.get("micro-batch-size", 1)),
            batch,
            new_embeddings=settings.get("train-new-embeddings", False),
            train_everything=settings.get("train-everything", False),
            stage1_experts=settings.get("stage1-experts", "all"),
            optimizer_cpu_offload=settings.get("optimizer-cpu-offload", False),
            bf16_moments=settings.get("bf16-moments", False),
            sizes=tuple((name, int(own[flag[2:]])) for name, flag in SIZES.items() if own.get(flag[2:])),
        )

    @cached_property
    def result(self) -> ModelSpec:
        """The finished model."""
        return self._spec_of(self.num_new_experts) if self._project.has_experts else self._base[1]

    @property
    def _spec(self) -> ModelSpec:
        """The model that the stages train."""
        return self.result if self._project.way == "moe-lpr" else self._base[1]

    @property
    def ffn_modules(self) -> list[str]:
        """The names of the base's FFN projections as modules."""
        family, base = self._base
        ffn = (piece for piece in pieces(family.table, base) if piece.part is Part.DENSE_FFN)
        return sorted({name.partition(".weight")[0].rpartition(".")[2] for piece in ffn for name in piece.hf_names})

    @cached_property
    def _base(self) -> tuple[Family, ModelSpec]:
        try:
            family, base = read_base(self._config_folder())
        except UserError as error:
            raise UserError(f"{self._file.at('model')}model: {error}") from None
        if base.moe is not None and self._project.way != "moe-lpr":
            raise UserError(
                f"{self._file.at('model')}model: {self._project.model} is an MoE, of which {self._project.way} trains "
                "nothing; name a dense base, or set method: review"
            )
        return family, base

    def _spec_of(self, num_new_experts: int) -> ModelSpec:
        experts = self._project.experts
        family, base = self._base
        new = NewExperts(num_new_experts, experts.topk, experts.copies, moe_every_k_layers=experts.every_k_layers)
        with self._named_keys(key="experts"):
            spec = with_new_experts(family, base, new.with_default_copies(base))
        if vocabulary := self._project.vocabulary:
            spec = spec.with_new_tokens(spec.megatron_args["vocab_size"], vocabulary.new_tokens)
        return spec
