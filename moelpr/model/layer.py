"""LPRMoELayer: the original expert stays at home, the new experts are dispatched by Megatron."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from moelpr.model.config import MoELPRConfig


@dataclass
class LPRMoESubmodules(MoESubmodules):
    """Megatron's submodules of an MoE layer plus the layers the original expert is built from."""

    original_expert: MLPSubmodules | None = None


class NewExpertsDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all for the rows of new experts only.

    Megatron assumes tokens x top-k routed rows; with the original expert's rows taken out the count depends on the
    routing, as it does with token dropping.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._rows_come_sorted:
            return super().dispatch_postprocess(rows, weights)
        return rows, self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert), weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return rows if self._rows_come_sorted else super().combine_preprocess(rows)

    @property
    def _rows_come_sorted(self) -> bool:
        """Rows of a single rank leave it in the order of its experts; Megatron copies them into that order again."""
        return self.ep_size * self.tp_size == 1


class OriginalExpertAtHome:
    """The original expert's pass over one micro-batch, on a stream of its own, in the dispatcher's seat for shared
    experts.

    Megatron calls these methods between the steps of the new experts' dispatch. The pass is launched behind the rows'
    exchange and ahead of the weights': where a GPU starts kernels in the order of their launches
    (CUDA_DEVICE_MAX_CONNECTIONS=1), the second exchange waits for the first, and what is launched behind it as well.
    """

    side_stream: torch.cuda.Stream | None = None  # one for all layers

    def __init__(self, expert: Callable[[Tensor, Tensor, Tensor], Tensor], gate_weight_T: Tensor) -> None:
        if OriginalExpertAtHome.side_stream is None:
            OriginalExpertAtHome.side_stream = torch.cuda.Stream()
        self._stream, self._expert, self._gate_weight_T = OriginalExpertAtHome.side_stream, expert, gate_weight_T

    def pre_forward_comm(self, hidden_SBH: Tensor) -> None:
        """Find the tokens, which waits for the routing, while the stream is still empty."""
        self._hidden_SBH = hidden_SBH
        self._chosen = self._gate_weight_T.nonzero().squeeze(1)

    def wait_current_stream(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def linear_fc1_forward_and_act(self, rows_under_way: Tensor) -> None:
        """The whole pass. Backward runs on the same stream and waits where streams meet: autograd sees to it."""
        with torch.cuda.stream(self._stream):
            self._output = self._expert(self._hidden_SBH, self._gate_weight_T, self._chosen)
        for tensor in (self._hidden_SBH, self._gate_weight_T, self._chosen):
            tensor.record_stream(self._stream)

    def linear_fc2_forward(self, rows_under_way: Tensor) -> None:
        pass

    def post_forward_comm(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._output.record_stream(torch.cuda.current_stream())

    def get_output(self) -> Tensor:
        return self._output


class LPRMoELayer(MoELayer):
    """Mixture of the frozen original expert (column 0 of the router) and N new experts (columns 1..N).

    The original expert never travels: being frozen, every expert-parallel rank holds its own copy, which cannot
    diverge and needs no gradient, no optimizer state and no communication. With expert tensor parallelism it is split
    over those ranks and gathers its tokens the way shared experts do.

    On a GPU it works while the new experts' rows are under way, as Megatron's shared experts do.
    """

    config: MoELPRConfig

    def __init__(
        self,
        config: MoELPRConfig,
        submodules: LPRMoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        assert pg_collection is not None and submodules.original_expert is not None
        self.token_dispatcher = NewExpertsDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        self.etp_group = pg_collection.expt_tp
        self.original_expert = MLP(
            config,
            submodules.original_expert,
            is_expert=True,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            tp_group=self.etp_group,
        )
        for parameter in self.original_expert.parameters():
            # A replicated parameter, unlike the dispatched experts' (matters only where it trains: --train-everything).
            parameter.allreduce = True
            parameter.sequence_parallel = config.sequence_parallel and self.etp_group.size() == 1
            parameter.tensor_model_parallel = self.etp_group.size() > 1

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[sequence, batch, hidden] in and out; the residual is added by the caller.

        Args:
            padding_mask: [batch, sequence] language bits. Megatron hands this one per-token argument from the model
                through block, layer and recompute to every MoE layer, so the bit travels in it.
        """
        assert intermediate_tensors is None, "CUDA graphs inside the MoE layer are refused by arguments/method.py"
        bits_SB = None if padding_mask is None else padding_mask.transpose(0, 1)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._mixture, False, hidden_states, bits_SB), None
        return self._mixture(hidden_states, bits_SB), None

    def _mixture(self, hidden_SBH: Tensor, bits_SB: Tensor | None) -> Tensor:
        gate_weights_TE, is_chosen_TE = self.route(hidden_SBH, bits_SB)
        new_weights, new_choices = gate_weights_TE[:, 1:].contiguous(), is_chosen_TE[:, 1:].contiguous()
        original_weight = gate_weights_TE[:, 0]
        if self._original_expert_is_split:
            original_weight = gather_from_sequence_parallel_region(original_weight, group=self.etp_group)
        self.token_dispatcher.shared_experts = OriginalExpertAtHome(self._original_expert_output, original_weight)
        rows, row_weights = self.preprocess(hidden_SBH, new_weights, new_choices)
        rows, row_weights = self.dispatch(rows, row_weights)
        output, _ = self.routed_experts_compute(rows, row_weights)
        output = self.token_dispatcher.combine_postprocess(self.combine(output))
        self.token_dispatcher.shared_experts = None  # or it would hold this micro-batch
        return output

    @property
    def _original_expert_is_split(self) -> bool:
        return self.etp_group.size() > 1

    def _original_expert_output(self, hidden_SBH: Tensor, gate_weight_T: Tensor, chosen: Tensor) -> Tensor:
        """The original expert on the tokens `chosen` of all that its ranks share, weighted, zero elsewhere."""
        hidden_TH = hidden_SBH.flatten(0, 1)
        if self._original_expert_is_split:
            hidden_TH = gather_from_sequence_parallel_region(hidden_TH, group=self.etp_group)
        rows, _ = self.original_expert(hidden_TH[chosen], per_token_scale=gate_weight_T[chosen])
        output_TH = torch.zeros_like(hidden_TH).index_add(0, chosen, rows.to(hidden_TH.dtype))
        if self._original_expert_is_split:
            output_TH = reduce_scatter_to_sequence_parallel_region(output_TH, group=self.etp_group)
        return output_TH.view_as(hidden_SBH)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.etp_group.size() == 1:
            # Every tensor-parallel rank holds the whole original expert: one of them writes it.
            for key, tensor in state.items():
                if key.startswith(f"{prefix}original_expert."):
                    pp, _, dp = tensor.replica_id
                    tensor.replica_id = (pp, self.attn_tp_group.rank(), dp)
        return state
