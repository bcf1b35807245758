"""Load a Megatron checkpoint in a single process: for tests, comparisons and evaluation, not for training."""

from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from moelpr.checkpoints.chain import checkpoint_chain, verify_files
from moelpr.model.builder import block_spec
from moelpr.model.config import MoELPRConfig
from moelpr.model.weights import load_weights
from moelpr.model_spec import ModelSpec
from moelpr.store.checksums import Verify

_TRANSFORMER_FIELDS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
    "add_bias_linear add_qkv_bias qk_layernorm"
).split()


def transformer_config(spec: ModelSpec, **settings: object) -> MoELPRConfig:
    """Megatron's config for one process, without kernels that need a GPU; `settings` override its fields."""
    shape = spec.megatron_args
    fields: dict[str, object] = {name: shape[name] for name in _TRANSFORMER_FIELDS}
    fields |= {
        "layernorm_epsilon": shape["norm_epsilon"],
        "window_size": shape.get("window_size"),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "hetereogenous_dist_checkpoint": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_activation_fusion": True,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
        "expert_tensor_parallel_size": 1,
    }
    if spec.moe is not None:
        fields |= {
            "num_moe_experts": spec.moe.num_new_experts,
            "num_original_experts": spec.moe.num_original_experts,
            "original_copies": spec.moe.original_copies,
            "moe_router_topk": spec.moe.topk,
            "moe_ffn_hidden_size": shape["ffn_hidden_size"],
            "moe_layer_freq": [int(spec.is_moe_layer(layer)) for layer in range(shape["num_layers"])],
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
        }
    return MoELPRConfig(**(fields | settings))  # type: ignore[arg-type]


def build_model(spec: ModelSpec, **settings: object) -> GPTModel:
    """A model with random weights; call inside `bootstrap.single_process`. `settings` are fields of MoELPRConfig."""
    shape = spec.megatron_args
    config = GPTModelConfig(
        transformer=transformer_config(spec, **settings),
        transformer_layer_spec=block_spec,
        vocab_size=shape["vocab_size"],
        seq_length=shape["max_position_embeddings"],
        share_embeddings_and_output_weights=not shape["untie_embeddings_and_output_weights"],
        position_embedding_type=shape["position_embedding_type"],
        rotary_base=shape["rotary_base"],
        rope_scaling=shape.get("use_rope_scaling", False),
        rope_scaling_factor=shape.get("rope_scaling_factor", 8.0),
    )
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    return model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model


def load_model(folder: Path, verify: Verify = Verify.FULL, **settings: object) -> GPTModel:
    """The fp32 model in a folder of the converter or the trainer; call inside `bootstrap.single_process`.

    Raises:
        UserError: there is no checkpoint, it does not match its model_spec.json, or its base is missing or has changed.
    """
    spec = ModelSpec.read(folder)
    links = checkpoint_chain(folder)
    verify_files(links, verify)
    model = build_model(spec, **settings)
    load_weights([model], links)
    return model


@torch.no_grad()
def logits(model: GPTModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [batch, sequence, vocabulary]."""
    model.eval()
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return model(tokens_BS, positions, attention_mask=None).float()
