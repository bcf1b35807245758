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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Weight(torch.nn.Module):
    """A module for one stacked weight, whose name becomes part of the checkpoint key.

    Call the module to read the weight: with --overlap-param-gather, Megatron waits for it in a forward hook.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight


class _ZeroGradientOfIdleExperts(torch.autograd.Function):
    """Returns the weights [n, …]; in the backward pass, sets the gradient of each expert without rows to 0.

    On some GPUs, grouped_mm leaves it unwritten (PyTorch issue 172439).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idle_experts: list[int]) -> Tensor:
        ctx.idle_experts = idle_experts
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        for expert in ctx.idle_experts:
            gradient[expert].zero_()
        return gradient, None


class GroupedExperts(MegatronModule):
    """SwiGLU experts on `torch.nn.functional.grouped_mm`.

    Weights of the n experts on this rank, each split over the expert-tensor-parallel ranks along its FFN dimension f:
    linear_fc1 [n, 2f, hidden] (gate rows, then up rows), linear_fc2 [n, hidden, f].
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, **_: object
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
        fc1, fc2 = self.linear_fc1(), self.linear_fc2()
        if idle_experts := [expert for expert, number in enumerate(tokens_per_expert.tolist()) if number == 0]:
            fc1, fc2 = (_ZeroGradientOfIdleExperts.apply(weight, idle_experts) for weight in (fc1, fc2))
        ends = tokens_per_expert.to(hidden_TH.device, non_blocking=True).cumsum(0).to(torch.int32)

        def product(rows: Tensor, weight: Tensor) -> Tensor:
            """[T, in] times [n, out, in] of each row's expert."""
            weight = weight.transpose(1, 2)  # no copy: the layout that grouped_mm is tested with on GPUs
            if not len(rows):
                return rows @ weight[0]  # none for any expert, which nobody tests grouped_mm with on GPUs
            return torch.nn.functional.grouped_mm(rows, weight, offs=ends)

        gate_up = product(hidden_TH, fc1)
        # Computes in fp32, so that bf16 runs keep the routers' gradient; saves only gate_up for the backward pass.
        activated = weighted_bias_swiglu_impl(gate_up, None, gate_weight_T.unsqueeze(-1))
        return product(activated, fc2), None

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
