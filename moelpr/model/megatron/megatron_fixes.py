"""Fixes for bugs of Megatron Core 0.19.2 that affect every machine; those of optimizers are in optimizer_fixes.py.

`tests/unit/model/megatron/test_megatron_fixes.py` fails once a fix is no longer needed.
"""

import errno
import importlib.util
import logging
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from moelpr.base.errors import MachineError
from moelpr.base.files import atomic_file
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.model.megatron import checkpoint_reading, cpu, host_optimizer, optimizer_fixes
from moelpr.model.megatron.replacing import replaces


@cache
def install() -> None:
    """Apply all fixes, once per process. Call it before anything imports the patched names."""
    _use_prebuilt_dataset_helper()
    optimizer_fixes.install()
    _reduce_metrics_on_stages_without_routers()
    _say_why_a_step_was_not_saved()
    _replace_the_tracker_file_at_once()
    _divide_virtual_stages_unevenly()
    _load_checkpoints_by_the_names_in_them()
    _allow_multipliers()
    _watch_for_hangs_with_the_runs_settings()
    _save_orders_of_samples_at_once()
    _collect_write_results_in_this_process()
    checkpoint_reading.install()
    from moelpr.model.megatron import async_save, checkpoint_sums  # only now, as they import Megatron

    checkpoint_sums.install()
    async_save.install()
    _check_gradients_after_the_backward_pass()
    _let_compiled_functions_have_more_variants()
    _compute_rotary_angles_once()
    host_optimizer.install()


def _use_prebuilt_dataset_helper() -> None:
    """Megatron runs `make` for its dataset helper at every start, but the wheel has a built helper and no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return  # a source checkout: let Megatron build it
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def _reduce_metrics_on_stages_without_routers() -> None:
    """A pipeline stage without routers has no groups to reduce the other stages' MoE losses over.

    If it is the last stage, it logs the value of a single tensor-parallel rank.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    @replaces(MoEMetricsTracker, "ensure_initialized")
    def initialize_with_group(initialize: Callable[..., None], self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        is_new = name not in self._metrics
        initialize(self, name, *args, **kwargs)
        if is_new:
            # The z loss is a mean on each rank already.
            kind = "avg_group" if name == "z_loss" else "reduce_group"
            setattr(self._metrics[name], kind, parallel_state.get_tensor_and_context_parallel_group())


def _say_why_a_step_was_not_saved() -> None:
    """A full disk is a CheckpointException around a list of tracebacks without the reason."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver

    logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)  # it logs what is raised here

    @replaces(state_dict_saver, "save_state_dict_async_finalize")
    def finalize_with_reason(finalize: Callable[..., None], storage_writer: Any, *args: Any) -> None:
        try:
            finalize(storage_writer, *args)
        except (CheckpointException, OSError) as error:
            folder = storage_writer.checkpoint_dir
            tensors = [tensor for bucket in storage_writer.write_buckets for _, tensor in bucket[2][1]]
            free = shutil.disk_usage(folder).free
            if free < sum(tensor.nbytes for tensor in tensors):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            failures = error.failures if isinstance(error, CheckpointException) else {0: (error,)}
            reason = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures.items()) or "see rank 0"
            raise MachineError(
                f"{folder} could not be saved ({reason}), with {free / 1e9:,.1f} GB free on its disk; check the disk, "
                "and run the same command again to resume from the step before"
            ) from error


def _replace_the_tracker_file_at_once() -> None:
    """Megatron empties the tracker file before it writes to it: a full disk or a kill would leave no step to resume."""
    from megatron.core.msc_utils import MultiStorageClientFeature, maybe_msc

    @contextmanager
    def open_temporary(path: Path) -> Iterator[TextIO]:
        with atomic_file(path) as temporary, open(temporary, "w") as file:
            yield file

    def open_file(path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "w" or Path(path).name != TRACKER_FILE or MultiStorageClientFeature.is_enabled():
            return type(maybe_msc).__getattr__(maybe_msc, "open")(path, mode, *args, **kwargs)
        return open_temporary(Path(path))

    maybe_msc.open = open_file


def _divide_virtual_stages_unevenly() -> None:
    """HybridModel takes virtual stages from its pattern only, and then refuses a number for the first or last stage.

    Our pattern has the layers of every stage, with these numbers.
    """
    from megatron.core.models.hybrid import hybrid_layer_allocation

    @replaces(hybrid_layer_allocation, "select_pipeline_segment")
    def select(original: Callable[..., Any], pattern: str, pp_group: Any, vp_stage: int | None, **others: Any) -> Any:
        return original(pattern, pp_group, vp_stage, **others | {"first_stage_layers": None, "last_stage_layers": None})


def _load_checkpoints_by_the_names_in_them() -> None:
    """Megatron takes our runs for those of GPTModel, which it would translate: one layer of theirs becomes two.

    Our layers have the names of GPTModel's.
    """
    from megatron.training import checkpointing

    @replaces(checkpointing, "_maybe_setup_gpt_to_hybrid_load")
    def without_translation(*_: Any) -> tuple[None, bool]:
        return None, False


def _allow_multipliers() -> None:
    """HybridModel warns that muP, which Granite's multipliers are here, is not validated with it; our tests do that."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    HybridModel.mup_warning_printed = True  # type: ignore[attr-defined]


def _watch_for_hangs_with_the_runs_settings() -> None:
    """NVRx's hooks read --save and --enable-ft-package from the command line only, not from a recipe."""
    from megatron.training import ft_integration, get_args

    ft_integration.arguments = SimpleNamespace(parse_args=lambda ignore_unknown_args: get_args())


def _save_orders_of_samples_at_once() -> None:
    """Megatron takes its cache of a corpus's order as complete if all files exist, and writes them in place.

    After a kill or a full disk in the last one, every start fails ("mmap length is greater than file size").
    """
    from megatron.core.datasets import blended_dataset, gpt_dataset

    class NumpyWithAtomicSave:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def save(self, path: str, array: Any, **options: Any) -> None:
            with atomic_file(Path(path)) as temporary, open(temporary, "wb") as file:
                np.save(file, array, **options)

    gpt_dataset.numpy = blended_dataset.numpy = NumpyWithAtomicSave()


def _collect_write_results_in_this_process() -> None:
    """Without --async-save, a rank passes the results of its own writes to itself, through a process made for that.

    The process costs memory and a start, and a rank whose process is killed ends with a traceback.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import global_vars

    in_this_process = queue.Queue[Any]()

    @replaces(filesystem_async, "get_write_results_queue")
    def results_queue(through_process: Callable[[str], Any], mp_mode: str = "spawn") -> Any:
        is_async = getattr(global_vars._GLOBAL_ARGS, "async_save", False)
        return through_process(mp_mode) if is_async else in_this_process


def _check_gradients_after_the_backward_pass() -> None:
    """Megatron waits for the GPU twice per bucket of gradients, to see in the middle of the backward pass if it is NaN.

    The norms are those of this moment, before gradients are added up, but read when the pass is over.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    @replaces(BucketGroup, "check_grads")
    def note_norms(check: Callable[..., None], self: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        if check_for_large or get_rerun_state_machine().mode != RerunMode.DISABLED:
            check(self, check_for_nan_or_inf, check_for_large)
        else:
            self.unread_norms = [bucket.grad_data.norm(p=2) for bucket in self.buckets]

    @replaces(DistributedDataParallel, "finish_grad_sync")
    def finish_and_check(finish: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        finish(self, *args, **kwargs)
        groups = (*self.bucket_groups, *self.expert_parallel_bucket_groups)
        if norms := [norm for group in groups for norm in vars(group).pop("unread_norms", ())]:
            get_rerun_state_machine().validate_result(
                torch.stack(norms).sum(), lambda total: not total.isfinite(), "found NaN or Inf in local grad norm"
            )


def _let_compiled_functions_have_more_variants() -> None:
    """Numbers of rows of 0, 1 and more, dtypes and gradients make up to nine variants of Megatron's SwiGLU.

    torch compiles eight and then calls the function as it is, in many kernels.
    """
    if not cpu.is_needed():  # else nothing is compiled
        import torch._dynamo.config as compiler

        # Values that are set count for one thread only, and backward passes run in another one.
        compiler._config["recompile_limit"].default = max(32, compiler.recompile_limit)  # type: ignore[attr-defined]


def _compute_rotary_angles_once() -> None:
    """Without Transformer Engine, Megatron computes cos and sin in every layer, for queries and for keys.

    It also copies a tensor whose channels all turn, to join it with none, and turns it in five kernels instead of one.
    """
    from megatron.core.jit import jit_fuser
    from megatron.core.models.common.embeddings import rope_utils

    def turn(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, is_backward: bool) -> Tensor:
        if is_backward:
            return t * cos - rope_utils._rotate_half(t * sin, interleaved)
        return t * cos + rope_utils._rotate_half(t, interleaved) * sin

    Rotation.turn = jit_fuser(turn)

    @replaces(rope_utils, "_apply_rotary_pos_emb_bshd")
    def rotate(
        original: Callable[..., Tensor],
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        if mla_rotary_interleaved or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale)
        # Kept with the tensor of frequencies, which Megatron keeps for all layers and steps.
        kept: dict[Any, tuple[Tensor, Tensor]] = freqs.__dict__.setdefault("cos_and_sin", {})
        key = mscale, t.dtype, torch.is_inference_mode_enabled()  # a tensor of inference mode cannot be trained with
        if key not in kept:
            kept[key] = (torch.cos(freqs) * mscale).to(t.dtype), (torch.sin(freqs) * mscale).to(t.dtype)
        cos, sin = kept[key]
        rotated: Tensor = Rotation.apply(t, cos, sin, rotary_interleaved)
        return rotated


class Rotation(torch.autograd.Function):
    """Turns queries or keys, and their gradients back, each in one kernel on a GPU."""

    turn: Callable[..., Tensor]  # set above

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return Rotation.turn(t, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return Rotation.turn(gradient, *ctx.saved_tensors, ctx.interleaved, True), None, None, None
