"""LPRMoELayer: original experts replicated on every expert-parallel rank, new experts dispatched by Megatron."""

import copy
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import unpermute
from megatron.core.transformer.moe.shared_experts import set_tensor_grad_fn_sequence_sr
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.original_experts import OriginalExperts


class NewExpertsDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all for the rows of new experts only.

    Megatron assumes tokens x top-k routed rows. Without the original experts' rows, the number depends on the routing,
    so this uses Megatron's code path for token dropping, which expects a variable number.
    """

    shared_experts: "OverlappedOriginalExperts | None"

    def __init__(self, *args: Any, config: MoELPRConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=copy.copy(config), **kwargs)  # its own: see _maybe_dtoh_and_synchronize
        self._fuses_permutation = config.moe_permute_fusion

    def preprocess(self, routing_map: Tensor) -> Tensor:
        self.config.moe_permute_fusion = self._fuses_permutation
        tokens_per_expert = super().preprocess(routing_map)
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_permutation_1":  # the numbers are on the host now
            self.num_out_tokens = sum((tokens_per_expert if self.input_splits is None else self.input_splits).tolist())
            # If all choices of all tokens are original: Transformer Engine's kernels do not support zero rows.
            self.config.moe_permute_fusion = self._fuses_permutation and self.num_out_tokens > 0
        return tokens_per_expert

    def token_dispatch(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = super().token_dispatch(rows, weights)
        assert self.shared_experts is not None
        self.shared_experts.follow_in_backward(rows, weights)
        return rows, weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._rows_come_sorted:
            return super().dispatch_postprocess(rows, weights)
        return rows, self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert), weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        # Megatron adds the results of split experts in the dtype of `probs`, the fp32 gate weights, twice the bytes;
        # and keeps `probs`, and with them the layer's graph, until the next micro-batch.
        self.probs = rows.new_empty(0)
        return rows if self._rows_come_sorted else super().combine_preprocess(rows)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """Megatron's adds in place to a view, which costs the backward pass three copies of the layer's output."""
        output_TH = unpermute(
            rows,
            self.reversed_local_input_permutation_mapping,
            restore_shape=self.hidden_shape_before_permute,
            routing_map=self.routing_map,
            fused=self.config.moe_permute_fusion,
        )
        assert self.shared_experts is not None
        self.shared_experts.add_to(output_TH)
        return output_TH.view(self.hidden_shape)

    @property
    def _rows_come_sorted(self) -> bool:
        """On a single rank, rows are already in the order of its experts, so Megatron's sorting copy can be skipped."""
        return self.ep_size * self.tp_size == 1


class OverlappedOriginalExperts:
    """The original experts' pass over one micro-batch, overlapped with the new experts' dispatch on a side stream.

    Megatron calls these methods between the steps of the dispatch, through the dispatcher's shared-expert overlap
    hooks. Launch order matters: with CUDA_DEVICE_MAX_CONNECTIONS=1, a GPU starts kernels in the order of their
    launches. The pass is launched between the exchange of rows and that of weights, so that it overlaps with the first;
    its backward pass follows both (`follow_in_backward`).
    """

    side_stream: torch.cuda.Stream | None = None  # one for all layers

    def __init__(self, experts: OriginalExperts, gate_weights_TM: Tensor) -> None:
        if OverlappedOriginalExperts.side_stream is None:
            OverlappedOriginalExperts.side_stream = torch.cuda.Stream()
        # Split experts communicate in the group in which the dispatcher does, so not at the same time.
        self._stream = torch.cuda.current_stream() if experts.are_split else OverlappedOriginalExperts.side_stream
        self._experts, self._gate_weights_TM = experts, gate_weights_TM

    def pre_forward_comm(self, hidden_SBH: Tensor) -> None:
        """Start to copy each expert's number of tokens to the host.

        The dispatcher then waits for its own numbers, and with them for these: the layer's only wait for the GPU.
        """
        self._hidden_SBH = hidden_SBH
        self._num_chosen_M = self._gate_weights_TM.count_nonzero(dim=0).to("cpu", non_blocking=True)

    def wait_current_stream(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def linear_fc1_forward_and_act(self, rows_under_way: Tensor) -> None:
        """Run the pass. Autograd runs its backward on the same stream and synchronizes the streams."""
        with torch.cuda.stream(self._stream):
            self._tokens, self._output = self._experts(
                self._hidden_SBH, self._gate_weights_TM, self._num_chosen_M.tolist()
            )
        for tensor in (self._hidden_SBH, self._gate_weights_TM):
            tensor.record_stream(self._stream)

    def follow_in_backward(self, rows: Tensor, weights: Tensor) -> None:
        """Have the backward pass launch the exchange of weights, then that of rows, then the original experts.

        Autograd launches what is ready in descending order of sequence numbers, which count operations of the forward
        pass. By them, the original experts would come first, and the exchanges would wait for them.
        """
        if self._experts.are_split or rows.grad_fn is None or weights.grad_fn is None:
            return
        number = rows.grad_fn._sequence_nr()  # above that of the permutation, which waits for the exchange
        set_tensor_grad_fn_sequence_sr(rows, weights.grad_fn._sequence_nr() - 1)
        set_tensor_grad_fn_sequence_sr(self._output, number)

    def linear_fc2_forward(self, rows_under_way: Tensor) -> None:
        pass

    def post_forward_comm(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor in (self._tokens, self._output):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())

    def add_to(self, output_TH: Tensor) -> None:
        """Add the pass's output in place to that of the new experts."""
        if self._tokens is None:
            output_TH.add_(self._output)
        else:
            output_TH.index_add_(0, self._tokens, self._output)


class LPRMoELayer(MoELayer):
    """Mixture of m frozen original experts (the router's first P columns) and N new experts (the other columns).

    Every expert-parallel rank has copies of the original experts. Because they are frozen, the copies cannot diverge
    and need no gradient, optimizer state or communication. On a GPU they run while the new experts' rows are exchanged,
    as Megatron's shared experts do.
    """

    config: MoELPRConfig

    def __init__(
        self,
        config: MoELPRConfig,
        pg_collection: ProcessGroupCollection,
        original_experts: MLPSubmodules,
        **kwargs: Any,
    ) -> None:
        """`original_experts` are the layers that each original expert is built from."""
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = NewExpertsDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        self.original_experts = OriginalExperts(config, original_experts, pg_collection)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """The layer's output, to which the caller adds the residual.

        Args:
            hidden_states: [sequence, batch, hidden].
            padding_mask: language bits [batch, sequence]. This is the only per-token argument that Megatron passes from
                the model through block, layer and recompute to every MoE layer.

        Returns:
            [sequence, batch, hidden], and no bias.
        """
        assert intermediate_tensors is None, "moelpr.train.arguments rejects CUDA graphs in the MoE layer"
        bits_SB = None if padding_mask is None else padding_mask.transpose(0, 1)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._mixture, False, hidden_states, bits_SB), None
        return self._mixture(hidden_states, bits_SB), None

    def _mixture(self, hidden_SBH: Tensor, bits_SB: Tensor | None) -> Tensor:
        gate_weights_TE, is_chosen_TE = self.route(hidden_SBH, bits_SB)
        # Unlike slices, a split has one operation as its backward pass.
        p = self.config.num_original_places
        original_TP, new_TN = gate_weights_TE.split_with_sizes([p, gate_weights_TE.shape[1] - p], dim=1)
        original_weights = self.original_experts.gathered(self._original_weights(original_TP, is_chosen_TE))
        self.token_dispatcher.shared_experts = OverlappedOriginalExperts(self.original_experts, original_weights)
        new_choices = is_chosen_TE[:, p:]
        if self.config.moe_permute_fusion:  # torch's permutation copies the transposes
            new_TN, new_choices = new_TN.contiguous(), new_choices.contiguous()
        rows, row_weights = self.preprocess(hidden_SBH, new_TN, new_choices)
        rows, row_weights = self.dispatch(rows, row_weights)
        output, _ = self.routed_experts_compute(rows, row_weights)
        output = self.token_dispatcher.combine_postprocess(self.combine(output))
        self.token_dispatcher.shared_experts = None  # or it would keep this micro-batch alive
        return output

    def _original_weights(self, weights_TP: Tensor, is_chosen_TE: Tensor) -> Tensor:
        """Gate weights [T, m] of the original experts; the dense FFN's is the sum over its C copies."""
        c, p = self.config.original_copies, self.config.num_original_places
        if c == 1:
            return weights_TP
        copies_TC, *others = weights_TP.split_with_sizes([c, p - c], dim=1) if p > c else [weights_TP]
        dense_T1 = copies_TC.sum(dim=1, keepdim=True)
        # A token's gate weights sum to 1 only up to rounding; exactly 1 gives exactly the dense model's output.
        dense_T1 = dense_T1.masked_fill(~is_chosen_TE[:, c:].any(dim=1, keepdim=True), 1.0)
        return torch.cat([dense_T1, *others], dim=1) if others else dense_T1
