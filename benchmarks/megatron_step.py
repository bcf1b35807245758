"""One optimizer step as Megatron's train_step makes it: its wrapper, schedule and optimizer, without its logging."""

import itertools
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from moelpr.data.batch import Batch, GlobalCounts
from moelpr.training.forward_step import forward_step, next_token_loss


class MegatronStep:
    """Steps of `model`, whose trainable parameters are chosen already, on one micro-batch.

    Args:
        batch: the tensors a dataset gives (moelpr.data.batch), each [batch, sequence].
        is_plain: Megatron's own MoE layer, which would take the language bits for padding.
    """

    def __init__(
        self, model: GPTModel, batch: dict[str, Tensor], is_plain: bool = False, learning_rate: float = 1e-5
    ) -> None:
        config = model.config
        self.model, self.batch = model, batch
        wrapped = Float16Module(config, model) if config.bf16 else model
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
        self.wrapped = DistributedDataParallel(config, ddp_config, wrapped)
        self.wrapped.train()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=learning_rate,
                weight_decay=0.1,
                adam_beta2=0.95,
                clip_grad=1.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
            ),
            [self.wrapped],
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.forward_step = partial(_plain_forward_step, batch) if is_plain else forward_step
        self.schedule = get_forward_backward_func()

    def __call__(self) -> float:
        """Run the step; the next-token loss before it."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.forward_backward()
        success, _, _ = self.optimizer.step()
        assert success
        total, count = reports[0]["lm loss"]
        return float(total / count)

    def forward_backward(self) -> list[dict[str, Tensor]]:
        """Losses of the step; gradients end in the parameters' main_grad."""
        size, length = self.batch["tokens"].shape
        destroy_num_microbatches_calculator()
        init_num_microbatches_calculator(0, None, size, size, 1)
        return self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=itertools.repeat(self.batch),
            model=[self.wrapped],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=size,
            forward_only=False,
        )


def _plain_forward_step(batch: dict[str, Tensor], data_iterator: object, model: torch.nn.Module) -> tuple:
    output = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    unused = torch.zeros(())
    fields = Batch(
        tokens=batch["tokens"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"].float(),
        position_ids=batch["position_ids"],
        is_original=batch["is_original"].bool(),
        is_original_label=batch["is_original_label"].bool(),
        counts=GlobalCounts(original_tokens=unused, loss_tokens=unused),  # for the LPR loss, which the peer has not
    )
    return output, partial(next_token_loss, fields)
