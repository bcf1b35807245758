"""Fixes for bugs of Megatron Core 0.19.2 in optimizers and their checkpoints.

`tests/unit/model/megatron/test_megatron_fixes.py` fails once a fix is no longer needed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from moelpr.model.megatron.replacing import replaces


def install() -> None:
    """Apply all fixes, once per process."""
    _count_adam_steps_per_group()
    _load_optimizer_shards()
    _save_no_more_padding_than_flat_buffers_have()
    _save_reshardable_state_of_padded_buckets()
    _load_optimizers_without_parameters_and_with_other_learning_rates()
    _continue_the_schedule_of_a_reset_optimizer()
    _compute_the_gradient_norm_on_its_device()


def _count_adam_steps_per_group() -> None:
    """Without Transformer Engine and Apex, the distributed optimizer saves checkpoints that it can't load.

    It expects torch Adam's step count in the per-parameter state, exactly one on every rank; a rank without a shard has
    none. Optimizers that keep the count in the parameter group take another branch.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        _count_steps_of_empty_groups(optimizer.Adam)
        return
    optimizer.USING_PYTORCH_OPTIMIZER = False
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _count_steps_of_empty_groups(adam: Any) -> None:
    """Transformer Engine's and Apex's Adam skip groups without parameters, and so do not count their steps.

    The first stage saves the count for all; if it trains nothing, the others would resume with the bias correction of
    the first step.
    """

    @replaces(adam, "step")
    def step_all(step: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        result = step(self, *args, **options)
        for group in self.param_groups:
            if not group["params"]:
                group["step"] = group.get("step", 0) + 1
        return result


def _load_optimizer_shards() -> None:
    """In fp32 the distributed optimizer's shards are views of the parameters, and loading copies into them in place.

    With gradients enabled, this fails with "a view of a leaf Variable that requires grad is being used in-place".

    With --bf16-moments, Transformer Engine's Adam takes the 16 bits that a weight lacks as int16 only, but by parameter
    (--dist-ckpt-optim-fully-reshardable) Megatron saves everything in fp32.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @replaces(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    @torch.no_grad()
    def set_states(original: Callable[..., None], self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        if getattr(self.optimizer, "store_param_remainders", False) and parameter.dtype == torch.bfloat16:
            tensors = tensors | {"param": tensors["param"].to(torch.int16)}
        original(self, parameter, tensors)


def _save_no_more_padding_than_flat_buffers_have() -> None:
    """If tied embeddings train in a pipeline, saving the distributed optimizer may fail: "has out of bounds chunk".

    The bucket before them is saved up to the next multiple of 64 elements, but padded to its end, which may be later.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @replaces(DistributedOptimizer, "sharded_param_state_dp_reshardable")
    def cut_padding(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor):
                (start,), (end,) = part.global_offset, part.global_shape
                if len(part.data) > end - start:
                    part.data = part.data[: end - start]
                    part.local_shape = part.data.shape
        return state


def _save_reshardable_state_of_padded_buckets() -> None:
    """With --dist-ckpt-optim-fully-reshardable, parameters behind a padded bucket are saved with others' state.

    Buckets are gathered without their padding, but cut where parameters start with it.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @replaces(DistributedOptimizer, "sharded_param_state_fully_reshardable")
    def gather_padding_too(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = [(buffer, buffer.numel) for buffer in self.buffers]
        sizes += [(bucket, bucket.grad_data.numel()) for buffer in self.buffers for bucket in buffer.buckets]
        with ExitStack() as restore:
            for part, padded in sizes:
                restore.callback(setattr, part, "numel_unpadded", part.numel_unpadded)
                part.numel_unpadded = padded
            return original(self, *args, **kwargs)


def _load_optimizers_without_parameters_and_with_other_learning_rates() -> None:
    """If a pipeline stage trains nothing, its optimizer state is empty, and checkpoints drop empty parts.

    Loading then fails with a KeyError. The rest still has to be loaded: it contains the step count, which the first
    stage saves for all.

    And Megatron finds the saved state of a parameter group by its learning rates too, so none for changed rates. The
    new rates apply.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import (
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
        param_group_identifier_keys,
    )

    rates = ("max_lr", "min_lr")
    # With --decoupled-lr, groups differ in nothing else; Megatron marks those with the rates of --lr and --min-lr.
    names = ("default_config", *(name for name in param_group_identifier_keys if name not in rates))

    def identity(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in names)

    def load_state(load: Callable[[Any, dict[str, Any]], None], self: Any, state: dict[str, Any]) -> None:
        if isinstance(self, Float16OptimizerWithFloat16Params):
            state.setdefault("fp32_from_fp16_params", [])
        optimizer = state.get("optimizer", state)
        optimizer.setdefault("state", {})
        own = {identity(group): group for group in self.optimizer.param_groups}
        for group in optimizer["param_groups"]:
            same = own.get(identity(group), {})
            group |= {name: same[name] for name in rates if name in same}
        load(self, state)

    for kind in (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer):
        replaces(kind, "load_state_dict")(load_state)


def _continue_the_schedule_of_a_reset_optimizer() -> None:
    """With --no-load-optim, Megatron continues with the step but starts the learning-rate schedule again."""
    from megatron.training import training

    @replaces(training, "load_checkpoint")
    def load(
        original: Callable[..., Any], model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        loaded = original(model, optimizer, scheduler, *args, **kwargs)
        settings = training.get_args()
        if scheduler is not None and settings.no_load_optim and not settings.finetune:
            # The scheduler counts samples; those of --iterations-to-skip are consumed without a step.
            scheduler.step(settings.consumed_train_samples - settings.skipped_train_samples)
        return loaded


def _compute_the_gradient_norm_on_its_device() -> None:
    """Without Transformer Engine and Apex, Megatron copies the norm of each gradient to the host, one by one."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def l2_norm(chunk_size: int, noop_flag: Any, lists: list[list[Tensor]], *_: Any) -> tuple[Any, None]:
        norms = [torch.norm(tensor) for tensors in lists for tensor in tensors]
        return torch.norm(torch.stack(norms)).float().reshape(1), None

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


class GroupStepAdam(torch.optim.Adam):
    """torch's fused Adam(W) with the arguments of Transformer Engine's and Apex's FusedAdam.

    Like these, it keeps one step count per parameter group, whereas torch.optim.Adam keeps one per parameter.
    """

    def __init__(self, params: Any, adam_w_mode: bool = True, **settings: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects a step in every parameter's state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Megatron never passes one"
        for group in self.param_groups:
            steps_before = group.get("step", 0)
            group["step"] = steps_before + 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            states = [self._state_of(parameter) for parameter in params]
            adam(
                params,
                [parameter.grad for parameter in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                # Each has its own count, because adam counts in place. It is filled on the device: a copy would wait.
                [torch.full((), float(steps_before), device=parameter.device) for parameter in params],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                **{name: group[name] for name in ("lr", "weight_decay", "eps", "decoupled_weight_decay")},
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        return state
