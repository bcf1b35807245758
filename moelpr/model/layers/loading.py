"""Load a Megatron checkpoint in a single process: for tests, comparisons and evaluation, not for training."""

from dataclasses import fields
from pathlib import Path

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection

from moelpr.base.checksums import Verify
from moelpr.model.checkpoints.chain import checkpoint_chain, verify_chain, verify_step
from moelpr.model.layers.builder import MoELPRModelBuilder, MoELPRModelConfig
from moelpr.model.layers.config import FIXED_FOR_MOE, MoELPRConfig, shape_of
from moelpr.model.layers.weights import load_weights
from moelpr.model.megatron import checkpoint_reading
from moelpr.model.model_spec import ModelSpec


def transformer_config(spec: ModelSpec, **settings: object) -> MoELPRConfig:
    """Megatron's config for one process, without kernels that need a GPU; `settings` override its fields."""
    shape = shape_of(spec)
    shape |= {"layernorm_epsilon": shape["norm_epsilon"], "num_moe_experts": shape.get("num_experts")}
    shape["layernorm_zero_centered_gamma"] = shape.get("apply_layernorm_1p", False)
    shape |= FIXED_FOR_MOE | {"moe_router_dtype": "fp32"} if spec.moe is not None else {}
    names = {field.name for field in fields(MoELPRConfig)}
    values: dict[str, object] = {name: value for name, value in shape.items() if name in names}
    values |= {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "hetereogenous_dist_checkpoint": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_activation_fusion": True,
        "transformer_impl": "local",
        "expert_tensor_parallel_size": 1,
    }
    values |= dict.fromkeys(("bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"), False)
    return MoELPRConfig(**(values | settings))  # type: ignore[arg-type]


def build_model(spec: ModelSpec, **settings: object) -> HybridModel:
    """A model with random weights; call inside `bootstrap.single_process`. `settings` are fields of MoELPRConfig."""
    shape = spec.megatron_args
    config = MoELPRModelConfig(
        transformer=transformer_config(spec, **settings),
        vocab_size=shape["vocab_size"],
        seq_length=shape["max_position_embeddings"],
        share_embeddings_and_output_weights=not shape["untie_embeddings_and_output_weights"],
        position_embedding_type=shape["position_embedding_type"],
        rotary_base=shape["rotary_base"],
        rotary_percent=shape["rotary_percent"],
        rope_scaling=shape.get("use_rope_scaling", False),
        rope_scaling_factor=shape.get("rope_scaling_factor", 8.0),
    )
    model = MoELPRModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    return model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model


def load_model(folder: Path, verify: Verify = Verify.FULL, **settings: object) -> HybridModel:
    """The fp32 model of converter or trainer, inside `bootstrap.single_process`; UserError if it is not as recorded."""
    spec = ModelSpec.read(folder)
    links = checkpoint_chain(folder)
    verify_chain(links, verify)
    model = build_model(spec, **settings)
    load_weights([model], links)
    for link in links:
        verify_step(link, checkpoint_reading.taken(link), verify)
    return model


@torch.no_grad()
def logits(model: HybridModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [batch, sequence, vocabulary]."""
    model.eval()
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return model(tokens_BS, positions, attention_mask=None).float()
