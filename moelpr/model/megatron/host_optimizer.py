"""Fixes of Megatron's optimizer on the host (`--optimizer-cpu-offload`), which the trainer uses for all parameters.

tests/distributed/test_layouts.py compares runs with it and without it, also resumed.
"""

from collections.abc import Callable
from typing import Any

from moelpr.model.megatron.replacing import replaces


def install() -> None:
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # Megatron's leaves parameters of a machine without a GPU and those in fp32 out of one table or another, and then
    # fails in a step or when it loads a checkpoint.
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = _copies_on_the_host

    @replaces(HybridDeviceOptimizer, "__init__")
    def take_views(original: Callable[..., None], self: Any, params: list[dict[str, Any]], **options: Any) -> None:
        """In fp32, shards are views of parameters, which torch takes only if they keep a gradient."""
        for one in (one for group in params for one in group["params"] if not one.is_leaf):
            one.retain_grad()
        original(self, params, **options)

    @replaces(DistributedOptimizer, "state_dict")
    def without_classes(original: Callable[..., Any], self: Any) -> Any:
        """Groups name the classes of their optimizers, and a checkpoint with classes is not loaded."""
        state = original(self)
        for group in state["optimizer"]["param_groups"]:
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]
        return state

    @replaces(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    def keep_step(original: Callable[..., None], self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        """The step count next to the tensors is that of the start, not the saved one."""
        is_on_host = isinstance(self.optimizer, HybridDeviceOptimizer)
        original(self, parameter, {name: one for name, one in tensors.items() if not (is_on_host and name == "step")})

    @replaces(DistributedOptimizer, "load_state_dict")
    def load_with_own_settings(original: Callable[..., None], self: Any, state: Any) -> None:
        """Groups that were saved with this flag lack settings of a run without it, and the other way round."""
        original(self, state)
        for group in self.optimizer.param_groups:
            group.update({name: one for name, one in self.optimizer.defaults.items() if group.get(name) is None})


def _copies_on_the_host(self: Any, offload_fraction: float) -> tuple[Any, ...]:
    """An fp32 copy of each parameter, with the groups and tables that Megatron's method of this name returns."""
    assert offload_fraction == 1
    copies = {one: one.detach().to("cpu", copy=True).float() for group in self.param_groups for one in group["params"]}
    groups = [group | {"params": [copies[one] for one in group["params"]]} for group in self.param_groups]
    originals = {copy: one for one, copy in copies.items()}
    return [group for group in groups if group["params"]], [], copies, originals, dict(copies)
