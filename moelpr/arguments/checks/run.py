"""What the checks look at: the settings of a run, its model, its checkpoint, and its parallel layout."""

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelpr.arguments.sources import Sources
from moelpr.model_spec import ModelSpec


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, each at least 1 (a smaller one is another check's complaint). EP and ETP are the experts'."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    world_size: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], vpp: int, world_size: int) -> "Layout":
        """From parsed arguments or the record of a run."""

        def size(name: str, default: int = 1) -> int:
            value = settings.get(name)
            return max(1, value if isinstance(value, int) else default)

        tp = size("tensor_model_parallel_size")
        return cls(
            tp=tp,
            pp=size("pipeline_model_parallel_size"),
            vpp=max(1, vpp),
            cp=size("context_parallel_size"),
            ep=size("expert_model_parallel_size"),
            etp=size("expert_tensor_parallel_size", default=tp),
            world_size=world_size,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size; 1 where the world is too small, which is another check's complaint."""
        return max(1, self.world_size // (self.tp * self.pp * self.cp))


@dataclass(frozen=True)
class Run:
    """A run before anything is built.

    args: the settings, machine's included, stage's not.
    spec, shape: the model, and its shape under Megatron's names; None and empty where no checkpoint can be read.
    checkpoint: the folder this run starts or resumes from.
    step: the saved step of it that --ckpt-step names; None: the latest.
    record: recipe.yaml of that step; None: no run wrote it.
    recipe_is_read: False: nothing can be said about what is missing, it may be in the recipe.
    typed: what recipe and command line set, Megatron's name → their flag.
    """

    args: argparse.Namespace
    spec: ModelSpec | None
    shape: dict[str, Any]
    checkpoint: Path | None
    step: int | None
    record: dict[str, Any] | None
    recipe_is_read: bool
    typed: dict[str, str]
    world_size: int

    @classmethod
    def of(cls, args: argparse.Namespace, sources: Sources) -> "Run":
        return cls(
            args=args,
            spec=sources.spec,
            shape=sources.shape,
            checkpoint=sources.checkpoint,
            step=sources.step,
            record=sources.record,
            recipe_is_read=sources.recipe_is_read,
            typed=sources.typed,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )

    @property
    def is_moe(self) -> bool:
        """True where the model has experts, unless the stage is the dense one (which has its own complaint)."""
        return self.spec is not None and self.spec.moe is not None and self.args.stage != "dense"

    @property
    def is_resumed(self) -> bool:
        """True where the checkpoint is this run's own: its optimizer, data position and step are taken up again."""
        own = {Path(folder) for folder in (self.args.load, self.args.save) if folder}
        return self.checkpoint in own and not self.args.finetune

    @property
    def is_sequence_parallel(self) -> bool:
        return self.layout.tp > 1 and (self.args.sequence_parallel or self.is_moe)

    @property
    def virtual_stages(self) -> int:
        """Virtual pipeline stages per rank, 1 where there are none or their number makes no sense."""
        if self.args.num_virtual_stages_per_pipeline_rank is not None:
            return max(1, self.args.num_virtual_stages_per_pipeline_rank)
        per_stage = self.args.num_layers_per_virtual_pipeline_stage
        stages = self.args.pipeline_model_parallel_size
        if not per_stage or not self.shape or per_stage < 1 or stages < 1:
            return 1
        return max(1, self.shape["num_layers"] // stages // per_stage)

    @property
    def layout(self) -> Layout:
        return Layout.of(vars(self.args), self.virtual_stages, self.world_size)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def one_of(values: list[int]) -> str:
    """ "1", or "one of 1, 2, 4"."""
    return f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(*values)


def neighbours(number: int, multiple: int) -> str:
    """The multiples of `multiple` around `number`: "28 or 32"."""
    below, above = number // multiple * multiple, math.ceil(number / multiple) * multiple
    return f"{below} or {above}" if below else str(above)
