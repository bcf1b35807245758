"""The tasks that run the trainer: all train with the same settings, but for what `Training` names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.real_model.settings import (
    BATCH,
    BETA2,
    MICRO_BATCH,
    SEEDS,
    SEQUENCE_LENGTH,
    STEP_TOKENS,
    minimum_rate,
    warmup_steps,
)
from examples.real_model.task import Command, Task
from moelpr.checkpoints.chain import checkpoint_chain
from moelpr.process.errors import UserError
from moelpr.store.run_folder import FINISHED_FILE

SAVE_INTERVAL = 40  # steps
# Tokens per second on two cores of a Xeon with AVX-512 and bf16 matrix products.
_RATE_OF = {"stage0": 180, "stage1": 155, "stage2": 190, "dense": 235, "plain": 130}
# Of all ranks, at their peak, which in stage 1 is while a step is saved.
_MEMORY_GIB_OF = {"stage0": 9.5, "stage1": 9.5, "stage2": 5.0, "dense": 5.5, "plain": 16.5}
_DISK_GIB_OF = {"stage0": 0.8, "stage1": 3.4, "stage2": 0.1, "dense": 2.0, "plain": 5.3}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run of one stage.

    Attributes:
        model: its name, which is that of its task and of its folder.
        start: checkpoint that it starts from, named like its task.
        blend: language group -> its part of the text.
        steps, rate: a function if earlier tasks find the number.
        most_steps: what is expected of `steps` until then.
        settings: names of the settings that need it.
        options: further ones of the trainer.
        is_search: for a learning rate: it is not continued.
        trains_everything: as a plain MoE. The ranks share the optimizer and take a sequence at a time, for memory.
        corpora: how the names of the corpora start.
        after: tasks whose results decide its command.
    """

    model: str
    stage: str
    start: Path
    blend: Mapping[str, float]
    steps: int | Callable[[], int]
    rate: float | Callable[[], float]
    settings: frozenset[str]
    options: tuple[str, ...] = ()
    is_search: bool = False
    trains_everything: bool = False
    corpora: str = ""
    seed: int = SEEDS[0]
    after: tuple[str, ...] = ()
    most_steps: int = 0

    def task(self, run: Path) -> Task:
        kind = "plain" if self.trains_everything else self.stage
        return Task(
            self.model,
            self.settings,
            lambda: self._command(run),
            minutes=self._minutes(kind),
            memory_gib=_MEMORY_GIB_OF[kind],
            disk_gib=0.3 if self.is_search else _DISK_GIB_OF[kind],
            variables={"NPROC_PER_NODE": str(self._ranks)},
            blocks=not self.is_search,
            made_from=(self.start.name, *(f"preprocess-{self.corpora}{x}" for x in self.blend)),
            after=self.after,
            is_complete=lambda: self._is_complete(run / self.model),
            continues=run / self.model,
        )

    @staticmethod
    def _is_complete(folder: Path) -> bool:
        """Whether the last step is there, with the steps whose frozen tensors it needs; UserError if they are not."""
        return (folder / FINISHED_FILE).is_file() and bool(checkpoint_chain(folder))

    @property
    def _ranks(self) -> int:
        """Two of a plain MoE, unless the machine has a single GPU."""
        import torch

        return 2 if self.trains_everything and torch.cuda.device_count() != 1 else 1

    def _number_of_steps(self) -> int:
        """Raises a UserError while the earlier tasks that find it are not done."""
        return self.steps() if callable(self.steps) else self.steps

    def _minutes(self, kind: str) -> float:
        try:
            steps = self._number_of_steps()
        except UserError:
            steps = self.most_steps
        return 1.5 + steps * STEP_TOKENS / _RATE_OF[kind] / 60

    def _command(self, run: Path) -> Command:
        rate = self.rate() if callable(self.rate) else self.rate
        steps = self._number_of_steps()
        corpora: Command = [run / "data" / f"{self.corpora}{group}_text_document" for group in self.blend]
        if len(self.blend) > 1:
            corpora = [word for pair in zip(map(str, self.blend.values()), corpora, strict=True) for word in pair]
        return [
            *(f"launch/{self.stage}.sh", "--pretrained-checkpoint", self.start, "--data-path", *corpora),
            *("--save", run / self.model, "--train-iters", str(steps), "--seed", str(self.seed), "--bf16"),
            *("--seq-length", str(SEQUENCE_LENGTH), "--global-batch-size", str(BATCH)),
            *("--micro-batch-size", str(MICRO_BATCH // self._ranks), "--lr", f"{rate:g}"),
            *("--min-lr", f"{minimum_rate(rate):g}"),
            *("--lr-decay-style", "cosine", "--lr-warmup-iters", str(warmup_steps(steps))),
            *("--weight-decay", "0", "--adam-beta2", str(BETA2), "--log-interval", "10"),
            # No saved step but the last is kept.
            *("--save-interval", str(SAVE_INTERVAL), "--save-retain-interval", str(SAVE_INTERVAL * 1000)),
            *(["--train-everything", "--use-distributed-optimizer"] if self.trains_everything else []),
            *([] if self.trains_everything or self.stage == "dense" else ["--save-trained-only"]),
            *(["--no-save-optim"] if self.is_search else []),
            *self.options,
        ]
