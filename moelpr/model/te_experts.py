"""The new experts on Transformer Engine's grouped linear layers; imported only with --moe-grouped-gemm."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP


class TEGroupedExperts(TEGroupedMLP):
    """Megatron's TEGroupedMLP with the checkpoint keys of moelpr.model.experts.GroupedExperts only.

    It omits `_extra_state`, which is empty without FP8.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        layers = GroupedMLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        super().__init__(*args, submodules=layers, **kwargs)
        for parameter in self.parameters():
            parameter.allreduce = False  # as in GroupedExperts, so that optimizer state fits any layout

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if "_extra_state" not in name}
