"""LPRMoELayer: the original experts stay at home, the new experts are dispatched by Megatron."""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from moelpr.model.config import MoELPRConfig
from moelpr.model.original_experts import OriginalExperts


@dataclass
class LPRMoESubmodules(MoESubmodules):
    """Megatron's submodules of an MoE layer plus the layers each original expert is built from."""

    original_experts: MLPSubmodules | None = None


class NewExpertsDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all for the rows of new experts only.

    Megatron assumes tokens x top-k routed rows; with the original experts' rows taken out the count depends on the
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


class OriginalExpertsAtHome:
    """The original experts' pass over one micro-batch, on a stream of its own, in the dispatcher's seat for shared
    experts.

    Megatron calls these methods between the steps of the new experts' dispatch. The pass is launched behind the rows'
    exchange and ahead of the weights': where a GPU starts kernels in the order of their launches
    (CUDA_DEVICE_MAX_CONNECTIONS=1), the second exchange waits for the first, and what is launched behind it as well.
    """

    side_stream: torch.cuda.Stream | None = None  # one for all layers

    def __init__(self, experts: OriginalExperts, gate_weights_TM: Tensor) -> None:
        if OriginalExpertsAtHome.side_stream is None:
            OriginalExpertsAtHome.side_stream = torch.cuda.Stream()
        self._stream, self._experts = OriginalExpertsAtHome.side_stream, experts
        self._gate_weights_TM = gate_weights_TM

    def pre_forward_comm(self, hidden_SBH: Tensor) -> None:
        """Find the tokens, which waits for the routing, while the stream is still empty."""
        self._hidden_SBH = hidden_SBH
        self._chosen = [gate_weight_T.nonzero().squeeze(1) for gate_weight_T in self._gate_weights_TM.unbind(1)]

    def wait_current_stream(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def linear_fc1_forward_and_act(self, rows_under_way: Tensor) -> None:
        """The whole pass. Backward runs on the same stream and waits where streams meet: autograd sees to it."""
        with torch.cuda.stream(self._stream):
            self._output = self._experts(self._hidden_SBH, self._gate_weights_TM, self._chosen)
        for tensor in (self._hidden_SBH, self._gate_weights_TM, *self._chosen):
            tensor.record_stream(self._stream)

    def linear_fc2_forward(self, rows_under_way: Tensor) -> None:
        pass

    def post_forward_comm(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._output.record_stream(torch.cuda.current_stream())

    def get_output(self) -> Tensor:
        return self._output


class LPRMoELayer(MoELayer):
    """Mixture of m frozen original experts (the router's first m columns) and N new experts (the columns after them).

    The original experts never travel: being frozen, every expert-parallel rank holds its own copies, which cannot
    diverge and need no gradient, no optimizer state and no communication. On a GPU they work while the new experts'
    rows are under way, as Megatron's shared experts do.
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
        assert pg_collection is not None and submodules.original_experts is not None
        self.token_dispatcher = NewExpertsDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        self.original_experts = OriginalExperts(config, submodules.original_experts, pg_collection)

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
        m = self.config.num_original_experts
        original_weights = self.original_experts.gathered(gate_weights_TE[:, :m])
        self.token_dispatcher.shared_experts = OriginalExpertsAtHome(self.original_experts, original_weights)
        new_weights, new_choices = gate_weights_TE[:, m:].contiguous(), is_chosen_TE[:, m:].contiguous()
        rows, row_weights = self.preprocess(hidden_SBH, new_weights, new_choices)
        rows, row_weights = self.dispatch(rows, row_weights)
        output, _ = self.routed_experts_compute(rows, row_weights)
        output = self.token_dispatcher.combine_postprocess(self.combine(output))
        self.token_dispatcher.shared_experts = None  # or it would hold this micro-batch
        return output
