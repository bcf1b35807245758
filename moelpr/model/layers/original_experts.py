"""The m original experts of an MoE layer: the dense FFN, then the experts that earlier rounds of languages added."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.experts import Product


class _LinearMap(torch.autograd.Function):
    """A linear function of rows, whose backward pass is the transposed function."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, function: Callable[[Tensor], Tensor], transposed: Callable) -> Tensor:
        ctx.transposed = transposed
        return function(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transposed(gradient), None, None


def _sums_by_token(rows: Tensor) -> bool:
    """Whether to add a token's rows in one go: on a GPU, `index_add` would add them in any order."""
    return rows.is_cuda


class OriginalExperts(torch.nn.ModuleList):
    """Megatron MLPs, each on the tokens that chose it; several are computed together, in grouped products.

    Every expert-parallel rank has all of them. Expert tensor parallelism splits each over its ranks, which gather their
    tokens once for all m experts, as Megatron's shared experts do. T is the number of tokens that an expert sees: those
    of this rank, or of all ranks that share it; M is m; R is the number of choices, sorted by expert.
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

        self._stacks = {name: self._share_storage(name) for name in ("linear_fc1", "linear_fc2") if len(self) > 1}

    def _share_storage(self, name: str) -> Tensor:
        """Make the experts' weights parts of one tensor, which grouped products read."""
        stacked = torch.stack([weight.detach() for weight in self._weights(name)])
        for weight, part in zip(self._weights(name), stacked, strict=True):
            weight.data = part
        return stacked

    def _weights(self, name: str) -> list[Tensor]:
        return [getattr(expert, name).weight for expert in self]

    @property
    def are_split(self) -> bool:
        """Whether expert tensor parallelism divides each expert."""
        return self.etp_group.size() > 1

    def gathered(self, per_token: Tensor) -> Tensor:
        """Gather a tensor of this rank's tokens to one of the T tokens, along its first dimension."""
        return gather_from_sequence_parallel_region(per_token, group=self.etp_group) if self.are_split else per_token

    def forward(
        self, hidden_SBH: Tensor, gate_weights_TM: Tensor, num_chosen: list[int]
    ) -> tuple[Tensor | None, Tensor]:
        """Compute the experts' outputs times their gate weights.

        Args:
            hidden_SBH: this rank's tokens.
            gate_weights_TM: of all T tokens; not 0 if a token chose an expert.
            num_chosen: for each expert, how many tokens chose it.

        Returns:
            Tokens and rows [R, H] to add to them, or None and a row for each of this rank's tokens.
        """
        hidden_TH = self.gathered(hidden_SBH.flatten(0, 1))
        gate_weights = gate_weights_TM.t().flatten()
        chosen_R = gate_weights.detach().nonzero_static(size=sum(num_chosen)).squeeze(1)  # nonzero would wait
        # Not gate_weights[chosen_R], whose backward pass sorts on a GPU.
        scale_R = gate_weights.index_select(0, chosen_R)
        tokens_R = chosen_R if len(self) == 1 else chosen_R % len(hidden_TH)
        spread = partial(torch.index_select, dim=0, index=tokens_R)
        is_summed = len(self) > 1 and len(tokens_R) > 0 and _sums_by_token(hidden_TH)
        if is_summed:
            sums = partial(_sums, tokens_R.argsort(stable=True), gate_weights_TM.count_nonzero(dim=1))
            rows_RH = self._outputs(_LinearMap.apply(hidden_TH, spread, sums), scale_R, num_chosen)
            rows_RH = _LinearMap.apply(rows_RH, sums, spread)
        else:
            rows_RH = self._outputs(spread(hidden_TH), scale_R, num_chosen)
        rows_RH = rows_RH.to(hidden_TH.dtype)
        if not self.are_split:
            return None if is_summed else tokens_R, rows_RH
        output_TH = rows_RH if is_summed else torch.zeros_like(hidden_TH).index_add_(0, tokens_R, rows_RH)
        return None, reduce_scatter_to_sequence_parallel_region(output_TH, group=self.etp_group)

    def _outputs(self, rows_RH: Tensor, scale_R: Tensor, num_chosen: list[int]) -> Tensor:
        if len(self) == 1:
            output: Tensor = self[0](rows_RH, per_token_scale=scale_R)[0]
            return output
        fc1, fc2 = self._stacks.values()
        first = self._weights("linear_fc1")[0]
        if first.requires_grad or first.untyped_storage()._cdata != fc1.untyped_storage()._cdata:
            # They train, so Megatron has to see calls of their modules; or somebody has moved them.
            parts = zip(self, rows_RH.split(num_chosen), scale_R.split(num_chosen), strict=True)
            return torch.cat([expert(rows, per_token_scale=scale)[0] for expert, rows, scale in parts])
        ends = torch.tensor(num_chosen).cumsum(0, dtype=torch.int32).to(rows_RH.device, non_blocking=True)
        gate_up = Product.apply(rows_RH, fc1, ends, num_chosen, False)
        activated = weighted_bias_swiglu_impl(gate_up, None, scale_R.unsqueeze(1))
        return Product.apply(activated, fc2, ends, num_chosen, False)

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


def _sums(order_R: Tensor, num_chosen_T: Tensor, rows_RH: Tensor) -> Tensor:
    """The sum of each token's rows, which `order_R` sorts by token, in one kernel."""
    return torch.nn.functional.embedding_bag(order_R, rows_RH, num_chosen_T.cumsum(0) - num_chosen_T, mode="sum")
