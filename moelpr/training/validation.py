"""Held-out text of each language while training: bits per byte before the first step, every --eval-interval steps, and
at the end.

Every pass reads the same windows of --seq-length tokens, each token of them predicted once. Megatron's own validation
reads on in its data from pass to pass, and knows no languages; its door is used, its `evaluate` too.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.training import training as megatron_training
from torch import Tensor
from torch.utils.data import default_collate

from moelpr.data.dataset import TaggedGPTDataset, dataset_config
from moelpr.data.language_bits import LanguageBits, language_bits_path
from moelpr.training.bytes_per_token import bytes_per_token
from moelpr.training.metrics import StepLog
from moelpr.training.run_log import finite

_CONFIG_OF_TRAIN = 5  # its place among train()'s arguments after forward_step and model


@contextmanager
def validates(args: argparse.Namespace, step_log: StepLog) -> Iterator[None]:
    """In the context, Megatron's doors to validation lead to a pass over --validation-data, if that is given."""
    if not args.validation_data:
        yield
        return
    args.do_valid = True
    validation = Validation(args, step_log)
    megatrons = {name: getattr(megatron_training, name) for name in ("train", "evaluate_and_print_results")}

    def train(forward_step: Any, model: list[torch.nn.Module], *arguments: Any, **settings: Any) -> Any:
        if args.iteration == 0:
            config = settings.get("config") or arguments[_CONFIG_OF_TRAIN]
            validation.run(forward_step, model, config, iteration=0)
        return megatrons["train"](forward_step, model, *arguments, **settings)

    def evaluate_and_print_results(
        prefix: str, forward_step: Any, data_iterator: Any, model: Any, iteration: int, process: Any, config: Any,
        *arguments: Any, **settings: Any,
    ) -> None:  # fmt: skip
        validation.run(forward_step, model, config, iteration)

    megatron_training.train = train
    megatron_training.evaluate_and_print_results = evaluate_and_print_results
    try:
        yield
    finally:
        for name, function in megatrons.items():
            setattr(megatron_training, name, function)


@dataclass(frozen=True)
class HeldOut:
    """A language's held-out text.

    dataset: None on ranks that get their tokens from another one. num_windows: the same on every rank.
    bytes_per_token: None where it can't be told.
    """

    language: str
    group: str  # "original" or "expanded"
    dataset: TaggedGPTDataset | None
    num_windows: int
    bytes_per_token: float | None

    def micro_batches(self, args: argparse.Namespace) -> Iterator[dict[str, Tensor]] | None:
        """This data-parallel rank's; windows past the end fill the last global batch and count nothing."""
        if self.dataset is None:
            return None
        return self._micro_batches(self.dataset, args.eval_micro_batch_size, args.data_parallel_size)

    def _micro_batches(self, dataset: TaggedGPTDataset, size: int, num_ranks: int) -> Iterator[dict[str, Tensor]]:
        start = parallel_state.get_data_parallel_rank() * size
        while True:
            indices = range(start, start + size)
            yield default_collate([dataset[index if index < self.num_windows else None] for index in indices])
            start += num_ranks * size


class Validation:
    """Passes over every language; each rank calls `run` at the same steps."""

    def __init__(self, args: argparse.Namespace, step_log: StepLog) -> None:
        self.args, self.step_log = args, step_log
        self._held_out: list[HeldOut] | None = None
        self._last_iteration: int | None = None  # of the last pass

    def run(self, forward_step: Any, model: list[torch.nn.Module], config: Any, iteration: int) -> None:
        """One pass, unless this step has had one: Megatron asks again after the last step."""
        if iteration == self._last_iteration:
            return
        self._last_iteration = iteration
        if self._held_out is None:
            self._held_out = [held_out(self.args, *item) for item in named_prefixes(self.args).items()]
        results = {}
        for text in self._held_out:
            loss = self._mean_loss(text, forward_step, model, config)
            if loss is None:
                break  # --exit-duration-in-mins is over; Megatron ends the run next
            results[text.language] = result(text, loss)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1 and len(results) == len(
            self._held_out
        ):
            self.step_log.run_log.validation(iteration, results)
        self.step_log.restart_clock()

    def _mean_loss(self, text: HeldOut, forward_step: Any, model: list[torch.nn.Module], config: Any) -> float | None:
        """Nats per token, NaN except on the last pipeline stage; None: out of time."""
        batches = [text.micro_batches(self.args) for _ in model]
        losses, _, is_out_of_time = megatron_training.evaluate(
            forward_step,
            batches if len(model) > 1 else batches[0],
            model,
            None,
            config,
            eval_iters=math.ceil(text.num_windows / self.args.eval_global_batch_size),
        )
        if is_out_of_time:
            return None
        return float(losses.get("lm loss", math.nan))


def result(text: HeldOut, loss: float) -> dict[str, Any]:
    """What metrics.jsonl holds of a language: bits per byte, or per token where the bytes are not known."""
    bits_per_token = loss / math.log(2)
    bits = (
        {"bits_per_token": finite(bits_per_token)}
        if text.bytes_per_token is None
        else {"bits_per_byte": finite(bits_per_token / text.bytes_per_token)}
    )
    return {"group": text.group, "lm_loss": finite(loss), **bits}


def named_prefixes(args: argparse.Namespace) -> dict[str, str]:
    """--validation-data's LANG=PREFIX as language -> prefix."""
    return {language: prefix for language, _, prefix in (item.partition("=") for item in args.validation_data or [])}


def held_out(args: argparse.Namespace, language: str, prefix: str) -> HeldOut:
    """Every rank calls it: Megatron's builder has barriers."""
    config = replace(
        dataset_config(args),
        blend=None,
        blend_per_split=[None, ([prefix], None), None],
        split=None,
        drop_last_partial_validation_sequence=False,  # its end is padded instead
    )
    builder = BlendedMegatronDatasetBuilder(
        TaggedGPTDataset, [0, None, 0], lambda: parallel_state.get_tensor_model_parallel_rank() == 0, config
    )
    dataset = builder.build()[Split.valid.value]
    numbers = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if dataset is not None:
        numbers[0] = len(dataset)
    if torch.distributed.get_rank() == 0:
        numbers[1] = bytes_per_token(prefix, args.model_source) or 0.0
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    num_windows, known_bytes_per_token = int(numbers[0]), float(numbers[1]) or None
    if args.eval_iters:
        num_windows = min(num_windows, args.eval_iters * args.eval_global_batch_size)
    group = "original" if LanguageBits(language_bits_path(prefix)).num_original else "expanded"
    return HeldOut(language, group, dataset, num_windows, known_bytes_per_token)
