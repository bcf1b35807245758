"""The new experts as two grouped matrix products, on CPU and GPU, without Transformer Engine.

Checkpoint keys and shapes are those of Megatron's TEGroupedMLP.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from moelpr.model.layers.config import MoELPRConfig


class _Weight(torch.nn.Module):
    """A module for one stacked weight, whose name becomes part of the checkpoint key.

    Call the module to read the weight: with --overlap-param-gather, Megatron waits for it in a forward hook.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight


class Product(torch.autograd.Function):
    """Multiplies rows [T, in], sorted by expert, with the weights [n, out, in] of their experts.

    The weights' gradient is added to its sum over the micro-batches in the product itself, if torch can.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, num_rows: list[int], fuses: bool, *swiglu_inputs: Tensor
    ) -> Tensor:
        """The rows [T, out]; with `swiglu_inputs`, the backward pass computes their SwiGLU again instead of `rows`."""
        ctx.num_rows, ctx.fuses = num_rows, fuses
        ctx.save_for_backward(weight, ends, *(swiglu_inputs or (rows,) if weight.requires_grad else ()))
        return _multiply(rows, weight.transpose(1, 2), ends, num_rows)  # no copy, and the layout tested on GPUs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, ends, *kept = ctx.saved_tensors
        of_rows = of_weight = None
        if ctx.needs_input_grad[1]:
            rows = kept[0] if len(kept) == 1 else weighted_bias_swiglu_impl(kept[0], None, kept[1])
            if ctx.fuses and _can_add_in_product(weight):
                of_weight = _add_gradient(weight, gradient, rows, ctx.num_rows)
            else:
                of_weight = _gradient(weight, gradient, rows, ends, ctx.num_rows)
        if ctx.needs_input_grad[0]:
            of_rows = _multiply(gradient, weight, ends, ctx.num_rows)
        return of_rows, of_weight, *([None] * (len(ctx.needs_input_grad) - 2))


def grouped_mm_is_one_kernel(dtype: torch.dtype) -> bool:
    """Whether torch computes grouped_mm in one kernel; otherwise it waits for the GPU and calls one per expert.

    As of torch 2.15: for bf16 on Hopper and on the data center GPUs of Blackwell.
    """
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def _takes_grouped_mm(rows: Tensor) -> bool:
    return not rows.is_cuda or grouped_mm_is_one_kernel(rows.dtype)


def _multiply(rows: Tensor, weights: Tensor, ends: Tensor, num_rows: list[int]) -> Tensor:
    """Rows [T, in], sorted by expert, times the experts' weights [n, in, out]."""
    if len(rows) and _takes_grouped_mm(rows):  # nobody tests grouped_mm without any row on GPUs
        return torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    result = rows.new_empty(len(rows), weights.shape[2])
    for of_one, weight, out in zip(rows.split(num_rows), weights, result.split(num_rows), strict=True):
        torch.mm(of_one, weight, out=out)
    return result


def _can_add_in_product(weight: Tensor) -> bool:
    total = getattr(weight, "main_grad", None)
    return total is not None and (
        total.dtype == weight.dtype or (total.dtype == torch.float32 and weight.device.type == "cuda")
    )


def _add_gradient(weight: Any, gradient: Tensor, rows: Tensor, num_rows: list[int]) -> Tensor:
    """Add the gradient to `main_grad`; returns what Megatron wants to see and does not read."""
    total: Tensor = weight.main_grad
    for sum_of_one, out, into in zip(total, gradient.split(num_rows), rows.split(num_rows), strict=True):
        if len(into) and total.dtype == weight.dtype:
            sum_of_one.addmm_(out.t(), into)
        elif len(into):
            torch.addmm(sum_of_one, out.t(), into, out_dtype=total.dtype, out=sum_of_one)
    weight.grad_added_to_main_grad = True
    return weight.detach()


def _gradient(weight: Tensor, gradient: Tensor, rows: Tensor, ends: Tensor, num_rows: list[int]) -> Tensor:
    if not len(rows):
        return torch.zeros_like(weight)
    if not _takes_grouped_mm(rows):
        of_weight = torch.empty_like(weight)
        for of_one, out, into in zip(of_weight, gradient.split(num_rows), rows.split(num_rows), strict=True):
            torch.mm(out.t(), into, out=of_one)
        return of_weight
    of_weight = torch.nn.functional.grouped_mm(gradient.t(), rows, offs=ends)
    for expert, number in enumerate(num_rows):
        if number == 0:
            of_weight[expert].zero_()  # some GPUs leave it unwritten (PyTorch issue 172439)
    return of_weight


class GroupedExperts(MegatronModule):
    """SwiGLU experts on `torch.nn.functional.grouped_mm`.

    Weights of the n experts on this rank, each split over the expert-tensor-parallel ranks along its FFN dimension f:
    linear_fc1 [n, 2f, hidden] (gate rows, then up rows), linear_fc2 [n, hidden, f].
    """

    config: MoELPRConfig

    def __init__(
        self, num_local_experts: int, config: MoELPRConfig, pg_collection: ProcessGroupCollection, **_: object
    ) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit and not config.add_bias_linear, "the experts are SwiGLU without bias"
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        ffn = config.moe_ffn_hidden_size // self.etp_group.size()
        self.linear_fc1 = self._weight(num_local_experts, 2 * ffn, config.hidden_size, partition_dim=1)
        self.linear_fc2 = self._weight(num_local_experts, config.hidden_size, ffn, partition_dim=2)
        if config.perform_initialization:
            # Real runs load a checkpoint; tests need a sensible initialization.
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                config.init_method(self.linear_fc1.weight)
                config.output_layer_init_method(self.linear_fc2.weight)

    def _weight(self, *shape: int, partition_dim: int) -> _Weight:
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        # False: an expert's parameter, reduced over the expert-data-parallel ranks, with an optimizer of its own.
        # Megatron sets this only if these differ from the data-parallel ranks; set always, optimizer state fits any
        # layout.
        setattr(weight, "allreduce", False)  # noqa: B010 (an attribute Megatron reads, unknown to torch's types)
        return _Weight(weight)

    def forward(self, hidden_TH: Tensor, tokens_per_expert: Tensor, gate_weight_T: Tensor) -> tuple[Tensor, None]:
        """Apply the experts.

        Args:
            hidden_TH: the T rows routed to this rank's experts, sorted by expert.
            tokens_per_expert: number of rows of each local expert, on the host; sums to T.
            gate_weight_T: gate weight of each row.

        Returns:
            The experts' outputs times the gate weights [T, H], in the same order; and no bias.
        """
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(hidden_TH.device, non_blocking=True)
        common = ends, tokens_per_expert.tolist(), self.config.fuse_expert_gradients
        gate_up = Product.apply(hidden_TH, self.linear_fc1(), *common)
        weights_T1 = gate_weight_T.unsqueeze(-1)
        # Computes in fp32, so that bf16 runs keep the routers' gradient; saves only gate_up for the backward pass.
        activated = weighted_bias_swiglu_impl(gate_up, None, weights_T1)
        recomputed = (gate_up, weights_T1) if self.config.recomputes_expert_activation else ()
        return Product.apply(activated, self.linear_fc2(), *common, *recomputed), None

    def backward_dw(self) -> None:
        """Called by Megatron; weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global tensors `experts.linear_fc1.weight` [N, 2f, hidden] and `experts.linear_fc2.weight` [N, hidden, f]."""
        assert not sharded_offsets, "checkpoints of MoE-LPR models have one key per layer"
        expert_axis = (0, self.ep_group.rank(), self.ep_group.size())
        etp_rank, etp_size = self.etp_group.rank(), self.etp_group.size()
        replica_id = (0, 0, self.edp_group.rank())

        def gate_and_up(
            key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            gate, up = (half.contiguous() for half in tensor.chunk(2, dim=1))
            gate_axis, up_axis = (1, etp_rank, 2 * etp_size), (1, etp_size + etp_rank, 2 * etp_size)
            return [
                ShardedTensor.from_rank_offsets(key, gate, expert_axis, gate_axis, replica_id=replica_id),
                ShardedTensor.from_rank_offsets(key, up, expert_axis, up_axis, replica_id=replica_id),
            ]

        fc1_key, fc2_key = (f"{prefix}experts.linear_{name}.weight" for name in ("fc1", "fc2"))
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        down = ShardedTensor.from_rank_offsets(
            fc2_key, fc2, expert_axis, (2, etp_rank, etp_size), replica_id=replica_id
        )
        gate_up = ShardedTensorFactory(fc1_key, fc1, gate_and_up, partial(torch.cat, dim=1), replica_id)
        return {f"{prefix}linear_fc1.weight": gate_up, f"{prefix}linear_fc2.weight": down}
