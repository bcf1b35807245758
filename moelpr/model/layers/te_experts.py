"""The new experts on Transformer Engine's grouped linear layers; imported only with --moe-grouped-gemm."""

import copy
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from moelpr.model.layers.config import MoELPRConfig


class TEGroupedExperts(TEGroupedMLP):
    """Megatron's TEGroupedMLP with the checkpoint keys of moelpr.model.layers.experts.GroupedExperts."""

    def __init__(self, num_local_experts: int, config: MoELPRConfig, **kwargs: Any) -> None:
        # The copy is for these layers only: Megatron's own linear layers, which are frozen, require Apex for it.
        config = copy.copy(config)
        config.gradient_accumulation_fusion |= config.fuse_expert_gradients
        layers = GroupedMLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        super().__init__(num_local_experts, config, submodules=layers, **kwargs)
        for parameter in self.parameters():
            parameter.allreduce = False  # as in GroupedExperts, so that optimizer state fits any layout
