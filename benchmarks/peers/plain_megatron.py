"""Plain Megatron MoE: its own MoELayer and SequentialMLP in the place of LPRMoELayer, everything else the same."""

from functools import partial

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from moelpr.model.builder import block_spec
from moelpr.model.loading import transformer_config
from moelpr.model_spec import ModelSpec


def submodules() -> MoESubmodules:
    """The parts of Megatron's MoE layer where Transformer Engine is not installed."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MoESubmodules(experts=partial(SequentialMLP, submodules=linears))


def plain_block_spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """moelpr's layers (norms, attention) with Megatron's MoE layer in each."""
    spec = block_spec(model_config, vp_stage)
    for layer in spec.layer_specs:
        layer.submodules.mlp = partial(MoELayer, submodules=submodules())
    return spec


def build(spec: ModelSpec, **settings: object) -> GPTModel:
    """A model of `spec`'s shape with all E = N + 1 experts in the group."""
    assert spec.moe is not None
    shape = spec.megatron_args
    settings = {"num_moe_experts": spec.moe.num_experts} | settings
    config = GPTModelConfig(
        transformer=transformer_config(spec, **settings),
        transformer_layer_spec=plain_block_spec,
        vocab_size=shape["vocab_size"],
        seq_length=shape["max_position_embeddings"],
        share_embeddings_and_output_weights=not shape["untie_embeddings_and_output_weights"],
        position_embedding_type=shape["position_embedding_type"],
        rotary_base=shape["rotary_base"],
    )
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
