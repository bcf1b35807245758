"""Faults of Megatron Core 0.19.2 that hit every machine, and the smallest cure of each.

`tests/unit/megatron_patches/test_megatron_fixes.py` fails once a fix is no longer needed.
"""

import importlib.util
from functools import wraps
from typing import Any


def install() -> None:
    _use_the_built_dataset_helper()
    _count_adam_steps_per_group()
    _load_fp32_optimizer_shards()
    _load_optimizers_without_parameters()


def _use_the_built_dataset_helper() -> None:
    """Megatron runs `make` for its dataset helper at every start; the wheel has the built helper and no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return  # a source checkout: let Megatron build it
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def _count_adam_steps_per_group() -> None:
    """Without Transformer Engine and Apex, the distributed optimizer saves checkpoints that it can't load.

    It looks for torch Adam's step count in per-parameter state and asserts that every rank finds exactly one; a rank
    without a shard finds none. Adams that keep the count in the parameter group go through another branch.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from moelpr.megatron_patches.adam import GroupStepAdam

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.USING_PYTORCH_OPTIMIZER = False
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _load_fp32_optimizer_shards() -> None:
    """In fp32 the distributed optimizer's shards are views of the parameters, which it copies into with gradients on.

    Loading a checkpoint then stops with "a view of a leaf Variable that requires grad is being used in-place".
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(load)


def _load_optimizers_without_parameters() -> None:
    """Where a pipeline stage trains nothing, its optimizer's state is empty, and empty parts get lost in a checkpoint.

    Loading then stops with a KeyError. What is left is loaded all the same: it has the step count, which the first
    stage saves for all.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    load_fp32, load_float16 = FP32Optimizer.load_state_dict, Float16OptimizerWithFloat16Params.load_state_dict

    @wraps(load_fp32)
    def load_fp32_state(self: FP32Optimizer, state: dict[str, Any]) -> None:
        state.setdefault("state", {})
        load_fp32(self, state)

    @wraps(load_float16)
    def load_float16_state(self: Float16OptimizerWithFloat16Params, state: dict[str, Any]) -> None:
        state.setdefault("fp32_from_fp16_params", [])
        state["optimizer"].setdefault("state", {})
        load_float16(self, state)

    FP32Optimizer.load_state_dict = load_fp32_state
    Float16OptimizerWithFloat16Params.load_state_dict = load_float16_state
