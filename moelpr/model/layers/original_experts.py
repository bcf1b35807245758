"""The m original experts of an MoE layer: the dense FFN, then the experts that earlier rounds of languages added."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from moelpr.model.layers.config import MoELPRConfig


class OriginalExperts(torch.nn.ModuleList):
    """Megatron MLPs that run one after another, each on the tokens that chose it.

    Every expert-parallel rank has all of them. Expert tensor parallelism splits each over its ranks, which gather their
    tokens once for all m experts, as Megatron's shared experts do. T is the number of tokens that an expert sees: those
    of this rank, or of all ranks that share it; M is m.
    """

    def __init__(self, config: MoELPRConfig, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection) -> None:
        etp, size = pg_collection.expt_tp, config.moe_ffn_hidden_size
        new_expert = partial(MLP, config, submodules, is_expert=True, ffn_hidden_size=size, tp_group=etp)
        super().__init__(new_expert() for _ in range(config.num_original_experts))
        self.etp_group, self.attn_tp_group = etp, pg_collection.tp
        parameter: Any  # Megatron reads attributes of it that torch's types lack
        for parameter in self.parameters():
            # Replicated, unlike the dispatched experts' parameters; matters only with --train-everything.
            parameter.allreduce = True
            parameter.sequence_parallel = config.sequence_parallel and not self.are_split
            parameter.tensor_model_parallel = self.are_split

    @property
    def are_split(self) -> bool:
        """Whether expert tensor parallelism divides each expert."""
        return self.etp_group.size() > 1

    def gathered(self, per_token: Tensor) -> Tensor:
        """Gather a tensor of this rank's tokens to one of the T tokens, along its first dimension."""
        return gather_from_sequence_parallel_region(per_token, group=self.etp_group) if self.are_split else per_token

    def forward(
        self, hidden_SBH: Tensor, gate_weights_TM: Tensor, chosen: Sequence[Tensor]
    ) -> list[tuple[Tensor | None, Tensor]]:
        """Compute the experts' outputs times their gate weights.

        Args:
            hidden_SBH: this rank's tokens.
            gate_weights_TM: of all T tokens.
            chosen: for each expert, the indices of the tokens among T that chose it.

        Returns:
            Parts of the sum over these experts: tokens and their rows [tokens, H], or None and a row of each of this
            rank's tokens.
        """
        hidden_TH = self.gathered(hidden_SBH.flatten(0, 1))
        parts = []
        # Unlike a view, unbinding one column is a copy in the backward pass.
        columns = gate_weights_TM.unbind(1) if len(self) > 1 else [gate_weights_TM.flatten()]
        for expert, gate_weight_T, tokens in zip(self, columns, chosen, strict=True):
            # Not hidden_TH[tokens], whose backward pass sorts the tokens on a GPU.
            scale_T = gate_weight_T.index_select(0, tokens)
            rows, _ = expert(hidden_TH.index_select(0, tokens), per_token_scale=scale_T)
            parts.append((tokens, rows.to(hidden_TH.dtype)))
        if not self.are_split:
            return [*parts]
        output_TH = torch.zeros_like(hidden_TH)
        for tokens, rows in parts:
            output_TH.index_add_(0, tokens, rows)
        return [(None, reduce_scatter_to_sequence_parallel_region(output_TH, group=self.etp_group))]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys `{j}.linear_fc1.weight` and `{j}.linear_fc2.weight`, j = 0 … m - 1."""
        state: ShardedStateDict = {}
        for number, expert in enumerate(self):
            assert isinstance(expert, MLP)
            state |= expert.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata)
        if not self.are_split:
            # Every tensor-parallel rank has the complete expert; one of them writes it.
            for tensor in state.values():
                pp, _, dp = tensor.replica_id
                tensor.replica_id = (pp, self.attn_tp_group.rank(), dp)
        return state
