"""Faults of Megatron Core 0.19.2 that hit every machine, and the smallest cure of each.

`tests/unit/compat/test_megatron_fixes.py` fails once a fix is no longer needed.
"""

import importlib.util


def install() -> None:
    _use_the_built_dataset_helper()
    _count_adam_steps_per_group()
    _load_fp32_optimizer_shards()


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

    from moelpr.compat.adam import GroupStepAdam

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
