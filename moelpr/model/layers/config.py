"""Megatron's TransformerConfig plus the MoE-LPR layer's fields, filled from the arguments of the same names."""

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moelpr.model.layers.losses import LPRVariant
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage1Experts

# Megatron's arguments and fields that would change a model with experts or that our layer ignores, with the only value
# that works.
FIXED_FOR_MOE: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax",
    "cuda_graph_impl": "none",
    "mlp_chunks_for_training": 1,
    **dict.fromkeys(
        "moe_router_pre_softmax moe_router_enable_expert_bias moe_router_force_load_balancing use_te_activation_func "
        "overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad qk_clip".split(),
        False,
    ),
    **dict.fromkeys(
        "moe_router_topk_scaling_factor moe_router_num_groups moe_router_force_biased moe_expert_capacity_factor "
        "moe_shared_expert_intermediate_size moe_latent_size moe_mlp_glu_interleave_size fp8 fp4 "
        "te_precision_config_file".split()
    ),
}


@dataclass
class MoELPRConfig(TransformerConfig):
    """`num_moe_experts` is N, the number of *new* experts, because Megatron dispatches them and divides them over EP.

    The router scores E = P + N places; the original experts are separate modules (docs/design/original-expert.md).
    """

    # m; more than 1 in a later round of languages, in which the experts of earlier rounds are original experts.
    num_original_experts: int = 1
    original_copies: int = 1  # C, the router rows of the dense FFN, which a rank holds and computes once
    lpr_loss_coeff: float = 0.0  # the paper's gamma; 0 disables the loss
    lpr_loss: LPRVariant = "paper"
    # The factor of an original-language token in the LPR loss, the same for all micro-batches of a global batch. The
    # loss is a mean over the original-language tokens of the global batch (of all ranks and micro-batches), whereas
    # every rank backpropagates a sum over its own; forward_step sets the factor so that Megatron's later scaling of
    # gradients results in that mean.
    lpr_token_weight: Tensor | None = None
    stage1_experts: Stage1Experts = "all"  # with "new", tokens cannot choose original experts in training
    train_everything: bool = False  # the paper's plain-MoE ablation: nothing is frozen, including the original experts
    residual_multiplier: float = 1.0  # Granite's, of what attention and FFN add to the residual
    norms_after: bool = False  # OLMo 2's layers normalize outputs, and queries and keys over all heads
    # The gradients of new experts are added to their fp32 sums in the matrix product itself.
    fuse_expert_gradients: bool = False
    # Megatron's flag: attention stays within a document (SDPACoreAttention).
    dataloader_inter_document_masking: bool = False

    # A wait for the GPU after each exchange of pipeline stages, which Megatron has for PyTorch before 2.
    batch_p2p_sync: bool = False

    recompute_modules: list[str] | None = None  # Megatron's field, typed

    def __post_init__(self) -> None:
        """Allow `moe_act` without Transformer Engine's grouped layers, and K = 1 with gate weights of 1.

        Megatron requires those layers for the former, and softmax before top-k for the latter, so that routers train.
        """
        modules, self.moe_router_pre_softmax = self.recompute_modules, self.moe_router_topk == 1
        if modules and not self.moe_grouped_gemm:
            self.recompute_modules = [name for name in modules if name != "moe_act"]
        super().__post_init__()
        self.recompute_modules, self.moe_router_pre_softmax = modules or self.recompute_modules, False

    @property
    def recomputes_expert_activation(self) -> bool:
        """Whether the backward pass computes the SwiGLU of new experts again instead of keeping its output."""
        return self.recompute_granularity == "selective" and "moe_act" in (self.recompute_modules or ())

    @property
    def num_original_places(self) -> int:
        """P = C + m - 1, the router's rows of original experts: the first ones."""
        return self.original_copies + self.num_original_experts - 1

    @property
    def is_moe_layer(self) -> list[bool]:
        """For each layer of the model, True if it has experts."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        assert not isinstance(self.moe_layer_freq, int), "model_spec.json names each layer"
        return [bool(flag) for flag in self.moe_layer_freq]

    @property
    def is_linear_layer(self) -> list[bool]:
        """For each layer of the model, True if its attention is linear: a Gated DeltaNet."""
        pattern = self.linear_attention_freq or [0] * self.num_layers
        assert not isinstance(pattern, int), "model_spec.json names each layer"
        return [bool(flag) for flag in pattern]


def shape_of(spec: ModelSpec) -> dict[str, Any]:
    """The shape of a model: names of Megatron's arguments → values."""
    shape = dict(spec.megatron_args)
    if spec.moe is not None:
        shape |= {
            "num_experts": spec.moe.num_new_experts,
            "num_original_experts": spec.moe.num_original_experts,
            "original_copies": spec.moe.original_copies,
            "moe_router_topk": spec.moe.topk,
            "moe_ffn_hidden_size": shape["ffn_hidden_size"],
            "moe_layer_freq": [int(spec.is_moe_layer(layer)) for layer in range(shape["num_layers"])],
        }
    return shape
