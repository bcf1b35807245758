"""Bits per byte of held-out text in each language: before the first step, every --eval-interval steps, and at the end.

Every pass reads the same windows of --seq-length tokens and predicts each token once.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from megatron.training.training import evaluate
from torch import Tensor
from torch.utils.data import default_collate

from moelpr.base import ranks
from moelpr.data.dataset import build_datasets, dataset_config, token_ids
from moelpr.data.language_bits import LanguageBits, language_bits_path, loss_bits_path
from moelpr.data.manifest import Manifest
from moelpr.model.megatron import hooks
from moelpr.model.metrics.run_metrics import HeldOutLoss, ValidationEvent
from moelpr.train.arguments.settings import RunSettings
from moelpr.train.early_stop import EarlyStop
from moelpr.train.run_log import finite
from moelpr.train.step_log import StepLog


@contextmanager
def validates(
    settings: RunSettings, args: argparse.Namespace, step_log: StepLog, early_stop: EarlyStop | None
) -> Iterator["Validation | None"]:
    """Score --validation-data, if given, wherever Megatron validates; `early_stop` may end the run there."""
    if not settings.validation_data:
        yield None
        return
    args.do_valid = True
    validation = Validation(settings, args, step_log, early_stop)
    with hooks.validation_by(validation.run):
        yield validation


@dataclass(frozen=True)
class HeldOut:
    """A language's held-out text."""

    language: str
    group: Literal["original", "expanded"]
    dataset: GPTDataset | None  # windows; None on ranks that get their tokens from another rank
    num_windows: int  # the same on every rank
    bytes_per_token: float | None  # UTF-8 bytes per token; None if unknown

    def micro_batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield this data-parallel rank's micro-batches of `size` windows.

        Windows past the end, which do not count, fill the last global batch.
        """
        assert self.dataset is not None
        rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for start in itertools.count(rank * size, world * size):
            indices = range(start, start + size)
            yield default_collate([self.dataset[index if index < self.num_windows else None] for index in indices])


class Validation:
    """Passes over every language; each rank calls `run` at the same steps."""

    def __init__(self, settings: RunSettings, args: argparse.Namespace, log: StepLog, stop: EarlyStop | None) -> None:
        self.settings, self.args, self.step_log, self.early_stop = settings, args, log, stop
        self._held_out: list[HeldOut] | None = None
        self._last_iteration: int | None = None  # the step of the last pass
        self.scored_step: int | None = None  # the step of the last pass that was not cut short

    def run(self, forward_step: Any, model: list[torch.nn.Module], config: Any, iteration: int) -> None:
        """Make a pass, unless this step has had one: Megatron asks again after the last step."""
        if iteration == self._last_iteration:
            return
        self._last_iteration = iteration
        if self._held_out is None:
            corpora = self.settings.validation_data
            self._held_out = [held_out(self.args, language, prefix) for language, prefix in corpora.items()]
        results = {}
        for text in self._held_out:
            loss = self._mean_loss(text, forward_step, model, config)
            if loss is None:
                break  # --exit-duration-in-mins has passed; Megatron ends the run next
            results[text.language] = result(text, loss)
        if len(results) == len(self._held_out):
            self.scored_step = iteration
            if ranks.is_last_rank():
                stage = self.settings.stage.name
                event = ValidationEvent(iteration=iteration, event="validation", stage=stage, languages=results)
                self.step_log.run_log.write(event)
            if self.early_stop is not None:
                self.early_stop.see(iteration, results)
                if self.early_stop.is_over:
                    self.args.exit_interval = iteration  # Megatron saves this step, and leaves its loop
        self.step_log.restart_clock()

    def _mean_loss(self, text: HeldOut, forward_step: Any, model: list[torch.nn.Module], config: Any) -> float | None:
        """The loss in nats per token, NaN except on the last pipeline stage; None if out of time."""
        size = self.args.eval_micro_batch_size
        batches = [None if text.dataset is None else text.micro_batches(size) for _ in model]
        data = batches if len(model) > 1 else batches[0]
        num_batches = math.ceil(text.num_windows / self.args.eval_global_batch_size)
        losses, _, is_out_of_time = evaluate(forward_step, data, model, None, config, eval_iters=num_batches)
        return None if is_out_of_time else float(losses.get("lm loss", math.nan))


def result(text: HeldOut, loss: float) -> HeldOutLoss:
    """The record of a language, from its mean loss in nats per token."""
    record = HeldOutLoss(group=text.group, lm_loss=finite(loss))
    bits = loss / math.log(2)
    if text.bytes_per_token is None:
        record["bits_per_token"] = finite(bits)
    else:
        record["bits_per_byte"] = finite(bits / text.bytes_per_token)
    return record


def held_out(args: argparse.Namespace, language: str, prefix: str) -> HeldOut:
    """Open a held-out corpus. Every rank must call this."""
    config = replace(
        dataset_config(args),
        tokenizer=token_ids(args, [prefix]),
        blend=None,
        blend_per_split=[None, ([prefix], None), None],
        split=None,
        drop_last_partial_validation_sequence=False,  # it is padded instead
    )
    dataset = build_datasets([0, None, 0], config)[Split.valid.value]
    numbers = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if dataset is not None:
        numbers[0] = len(dataset)
    if ranks.is_first_rank():
        numbers[1] = bytes_per_token(prefix) or 0.0
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    num_windows, known_bytes_per_token = int(numbers[0]), float(numbers[1]) or None
    if args.eval_iters:
        num_windows = min(num_windows, args.eval_iters * args.eval_global_batch_size)
    is_original = LanguageBits(language_bits_path(prefix)).num_original > 0
    return HeldOut(language, "original" if is_original else "expanded", dataset, num_windows, known_bytes_per_token)


def bytes_per_token(prefix: str) -> float | None:
    """The UTF-8 bytes per token of a corpus, from its manifest; None if it has none.

    An end-of-document token stands for no bytes, but it is predicted, so it counts.
    """
    manifest = Manifest.read(prefix)
    if loss_bits_path(prefix).exists() or manifest is None or not manifest.tokens:
        return None  # the bytes of the assistant's tokens, which alone count in conversations, are unknown
    return sum(count.bytes for count in manifest.languages.values()) / manifest.tokens
