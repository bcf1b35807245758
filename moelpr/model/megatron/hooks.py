"""Callbacks at points of Megatron's training loop where `pretrain()` offers none. Checked against Megatron Core 0.19.2.

Each hook replaces a function of Megatron while its context is open. Arguments are passed by their
names in Megatron's signatures; `tests/unit/model/megatron/test_hooks.py` fails when a function or a name is gone.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.training import get_args, global_vars
from megatron.training import training as megatron_training
from torch import Tensor

# Called with the losses, the learning rate, the iteration and the gradient norm.
LogStep = Callable[[dict[str, Tensor], float | None, int, float | None], None]
# Called with a model chunk, its data iterator, and the number and shape (sequences, tokens) of its micro-batches.
ReadStep = Callable[[torch.nn.Module, Iterator[Any] | None, int, tuple[int, int]], None]
# Called with Megatron's forward step, its model chunks, the model's config and the iteration.
Validate = Callable[[Any, list[torch.nn.Module], Any, int], None]


def after_training_log(log_step: LogStep) -> AbstractContextManager[None]:
    """Call `log_step` after each `training_log`, which every rank calls once per step."""

    def training_log(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        report_memory = call()
        log_step(named["loss_dict"], named["learning_rate"], named["iteration"], named["grad_norm"])
        return report_memory

    return _replaced("training_log", training_log)


def before_schedule(read_step: ReadStep) -> AbstractContextManager[None]:
    """Call `read_step` for each model chunk before the first forward pass of a training step or of a validation's."""

    def get_forward_backward_func(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        schedule = call()

        def read_and_run(**work: Any) -> Any:
            chunks, iterators = work["model"], work["data_iterator"]
            shape = work["micro_batch_size"], work["seq_length"]
            for chunk, iterator in zip(chunks, iterators if len(chunks) > 1 else [iterators], strict=True):
                read_step(chunk, iterator, work["num_microbatches"], shape)
            return schedule(**work)

        return read_and_run

    return _replaced("get_forward_backward_func", get_forward_backward_func)


def after_step_is_written(callback: Callable[[Path, float], None]) -> AbstractContextManager[None]:
    """Call `callback(step_folder, seconds)` on every rank when a step's files are written, before the tracker names it.

    With --async-save too: then in the trainer's process, when the helper has finished. `seconds` is the time that this
    took, with the callbacks of contexts that were opened earlier.
    """

    def save(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        started = time.monotonic()
        request = call()

        def finalize() -> None:
            callback(Path(named["checkpoint_dir"]), time.monotonic() - started)

        if request is None:
            finalize()
        else:
            request.add_finalize_fn(finalize)
        return request

    return _replaced("save", save, dist_checkpointing)


def after_step_is_read(callback: Callable[[Path], None]) -> AbstractContextManager[None]:
    """Call `callback(step_folder)` on every rank when it has read its part of a step folder."""

    def load(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        state = call()
        callback(Path(named["checkpoint_dir"]))
        return state

    return _replaced("load", load, dist_checkpointing)


@contextmanager
def validation_by(validate: Validate) -> Iterator[None]:
    """Call `validate` before the first step (iteration 0) and wherever Megatron would evaluate and print results.

    Megatron's own validation continues in its data from pass to pass, and has no languages.
    """

    def train(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        if get_args().iteration == 0:
            validate(named["forward_step_func"], named["model"], named["config"], 0)
        return call()

    def evaluate_and_print_results(call: Callable[[], Any], named: dict[str, Any]) -> None:
        validate(named["forward_step_func"], named["model"], named["config"], named["iteration"])

    with _replaced("train", train), _replaced("evaluate_and_print_results", evaluate_and_print_results):
        yield


def without_weight_decay(attribute: str) -> AbstractContextManager[None]:
    """Have the optimizer not decay the parameters that have an attribute of this name."""

    def get_megatron_optimizer_config(call: Callable[[], Any], named: dict[str, Any]) -> Any:
        config, overrides = call()
        return config, {**(overrides or {}), ParamKey(attr=attribute): ParamGroupOverride(wd_mult=0.0)}

    return _replaced("get_megatron_optimizer_config", get_megatron_optimizer_config)


def operations_per_sequence(number: float) -> AbstractContextManager[None]:
    """Have Megatron's throughput (--log-throughput) count these operations; its own count is of full training."""
    return _replaced("num_floating_point_operations", lambda _, named: number * named["batch_size"])


def without_wandb() -> AbstractContextManager[None]:
    """Have Megatron not log to Weights & Biases: its steps restart in every stage, and it logs all settings."""
    return _replaced("_set_wandb_writer", lambda call, named: None, global_vars)


def set_signal_handler(handler: Any) -> None:
    """Have Megatron ask `handler.signals_received()` after each step; its own handler supports only one signal."""
    get_args().exit_signal_handler = True
    global_vars._GLOBAL_SIGNAL_HANDLER = handler


@contextmanager
def _replaced(
    name: str, replacement: Callable[[Callable[[], Any], dict[str, Any]], Any], module: Any = megatron_training
) -> Iterator[None]:
    """Have Megatron call `replacement` with the original call, ready to run, and its arguments by name."""
    original = getattr(module, name)
    signature = inspect.signature(original)

    @wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(partial(original, *args, **kwargs), signature.bind(*args, **kwargs).arguments)

    setattr(module, name, replaced)
    try:
        yield
    finally:
        setattr(module, name, original)
