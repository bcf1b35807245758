"""Optimizer steps as the trainer makes them, without its logging; call `install_megatron` before importing this.

Models have Qwen2's shape, and every layer is an MoE layer.
"""

import argparse
from functools import partial
from typing import Any

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from benchmarks.baselines import plain_megatron
from benchmarks.common import model_spec, qwen2_config
from moelpr.data.batch import BatchReader
from moelpr.model.layers.freezing import freeze
from moelpr.model.layers.loading import build_model
from moelpr.model.layers.losses import megatron_balance_coeff
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage
from moelpr.train.forward_step import ForwardClock, forward_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BALANCE_COEFF, LPR_COEFF = 0.01, 0.1
# The trainer's choices on a GPU; the defaults of build_model are those of a CPU.
_SETTINGS: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "bias_activation_fusion": True}
_SETTINGS = _SETTINGS if DEVICE == "cuda" else {}


def spec_of(args: argparse.Namespace) -> ModelSpec:
    """The model of the sizes in `args` (benchmarks.common.SIZES), in bf16 on a GPU and fp32 on a CPU."""
    heads, shape = args.hidden // args.head, (args.layers, args.hidden, args.ffn, args.vocabulary, args.length)
    config = qwen2_config(*shape, heads, heads // 2)
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    return model_spec(config, args.new_experts, args.topk, dtype, args.original_copies)


def random_batch(spec: ModelSpec, sequences: int) -> dict[str, Tensor]:
    """Random tokens as a dataset returns them, every second sequence original-language text."""
    size = (sequences, spec.megatron_args["max_position_embeddings"])
    tokens = torch.randint(0, spec.megatron_args["vocab_size"], (size[0], size[1] + 1))
    is_original = (torch.arange(sequences) % 2 == 0).unsqueeze(1).expand(size).long()
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(size, dtype=torch.long),
        "position_ids": torch.arange(size[1]).expand(size),
        "is_original": is_original,
        "is_original_label": is_original,
    }
    return {name: tensor.contiguous().to(DEVICE) for name, tensor in batch.items()}


class MegatronStep:
    """Steps of `model`, whose trainable parameters are chosen already, on one micro-batch.

    `batch` are the tensors that a dataset returns (moelpr.data.batch), each [batch, sequence].
    """

    def __init__(self, model: HybridModel, batch: dict[str, Tensor]) -> None:
        config = model.config
        self.model, self.batch = model, batch
        wrapped = Float16Module(config, model) if config.bf16 else model
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
        self.wrapped = DistributedDataParallel(config, ddp_config, wrapped)
        self.wrapped.train()
        dtypes = {"bf16": config.bf16, "params_dtype": config.params_dtype}
        adam = {"optimizer": "adam", "lr": 1e-5, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 1.0}
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**adam, **dtypes), [self.wrapped])
        config.finalize_model_grads_func = config.finalize_model_grads_func or finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()

    @property
    def routers(self) -> list[Any]:
        return [layer.mlp.router for layer in self.model.decoder.layers]

    def __call__(self) -> float:
        """Run the step; returns the next-token loss before it."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.forward_backward()
        success, _, _ = self.optimizer.step()
        assert success
        total, count = reports[0]["lm loss"]
        return float(total / count)

    def forward_backward(self) -> list[dict[str, Tensor]]:
        """Losses of the step; gradients are then in the parameters' main_grad."""
        size, length = self.batch["tokens"].shape
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        num_microbatches_calculator.init_num_microbatches_calculator(0, None, size, size, 1)
        reader = BatchReader()
        reader.read(self.wrapped, iter([self.batch]), 1, (size, length))
        work = {"forward_step_func": partial(forward_step, reader, ForwardClock()), "data_iterator": None}
        sizes = {"num_microbatches": 1, "seq_length": length, "micro_batch_size": size}
        return self.schedule(**work, **sizes, model=[self.wrapped], forward_only=False)


def our_step(spec: ModelSpec, stage: Stage, batch: dict[str, Tensor]) -> MegatronStep:
    """The trainer's model in `stage` with the stage's default losses."""
    losses = {"stage1": {"moe_aux_loss_coeff": _balance_coeff(spec)}, "stage2": {"lpr_loss_coeff": LPR_COEFF}}
    model = build_model(spec, **losses.get(stage, {}), **_SETTINGS, fuse_expert_gradients=True)
    freeze([model], stage)
    return MegatronStep(model, batch)


def plain_step(spec: ModelSpec, batch: dict[str, Tensor]) -> MegatronStep:
    """Plain Megatron MoE, everything trained, with the balance loss."""
    return MegatronStep(plain_megatron.build(spec, moe_aux_loss_coeff=_balance_coeff(spec), **_SETTINGS), batch)


def _balance_coeff(spec: ModelSpec) -> float:
    return megatron_balance_coeff(BALANCE_COEFF, spec.moe.topk, len(spec.moe.layers)) if spec.moe else 0.0
