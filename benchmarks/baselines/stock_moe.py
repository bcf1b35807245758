"""MoE-LPR in stock transformers: its MoE class with grouped_mm, and a mask for the gradient of the original experts.

What a user can do with `transformers` alone: freeze everything but routers and experts, and set the gradient of the
first P experts, which are stacked with the others, to zero. The balance loss is that of transformers, which pools the
layers. Without weight decay, which would move the masked experts. Of a dense model, only the FFNs train (stage ffn).
"""

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

from moelpr.model.families.families import explicit_shape, family_named
from moelpr.model.model_spec import ModelSpec


class Router(torch.nn.Module):
    """A stock router, whose linear map is a method so that `benchmarks.imposed_routing.impose` can replace it."""

    weight: Tensor
    top_k: int

    def gating(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, E]."""
        return torch.nn.functional.linear(hidden_TH, self.weight)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self.gating(hidden_TH)
        weights_TK, choices_TK = torch.topk(torch.softmax(logits_TE, dim=-1, dtype=torch.float), self.top_k, dim=-1)
        return logits_TE, (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(logits_TE.dtype), choices_TK


def build(spec: ModelSpec) -> Any:
    """A randomly initialized model of `spec`'s shape, dense or every layer an MoE layer, in spec.dtype."""
    keys = family_named(spec.family).export_config(explicit_shape(spec), spec, spec.dtype)
    stock = getattr(transformers, keys["architectures"][0])
    config = stock.config_class(**keys, use_cache=False)
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm" if spec.moe else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the shared expert has size 0
        model = stock(config)
    for layer in model.model.layers if spec.moe else ():
        torch.nn.init.normal_(layer.mlp.gate.weight, std=config.initializer_range)
        layer.mlp.gate.__class__ = type("Router", (Router, type(layer.mlp.gate)), {})
    return model.to(getattr(torch, spec.dtype))


def freeze(model: Any, stage: str, num_original: int) -> None:
    """stage1: routers and new experts train; stage2: only routers; ffn: the FFNs of a dense model."""

    def mask(gradient: Tensor) -> Tensor:
        gradient[:num_original].zero_()
        return gradient

    model.requires_grad_(False)
    for layer in model.model.layers:
        (layer.mlp if stage == "ffn" else layer.mlp.gate).requires_grad_(True)
        if stage == "stage1":
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.requires_grad_(True)
                weight.register_hook(mask)


class StockStep:
    """One training step: forward, backward, clip at norm 1, torch's fused AdamW."""

    def __init__(self, spec: ModelSpec, stage: str, batch: dict[str, Tensor]) -> None:
        model, self.batch, self.num_original = build(spec), batch, spec.moe.num_original_places if spec.moe else 0
        freeze(model, stage, self.num_original)
        self.model = model.to(batch["tokens"].device).train()
        self.alpha, self.gamma = {"stage1": (0.01, 0.0), "stage2": (0.0, 0.1)}.get(stage, (0.0, 0.0))
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        adam: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0}
        self.optimizer = torch.optim.AdamW(self.trainable, **adam, fused=True)

    @property
    def routers(self) -> list[Router]:
        return [layer.mlp.gate for layer in self.model.model.layers]

    def __call__(self) -> float:
        """Run the step; returns the next-token loss before it."""
        total, next_token = self.loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return next_token.item()

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss that is minimized, and its next-token part.

        To the latter it adds 0.01 times the balance loss in stage 1, and in stage 2 0.1 times the LPR loss: the mean
        over layers and original-language tokens of -log score of the original experts.
        """
        routers: dict[str, Any] = {"output_router_logits": True} if self.num_original else {}
        output = self.model(self.batch["tokens"], **routers)
        next_token = torch.nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), self.batch["labels"].flatten()
        )
        if self.alpha:
            return next_token + self.alpha * output.aux_loss, next_token
        if not self.gamma:
            return next_token, next_token
        is_original_T = self.batch["is_original"].bool().flatten()
        logits_LTE = torch.stack(output.router_logits)[:, is_original_T].float()
        lpr = logits_LTE.logsumexp(-1) - logits_LTE[..., : self.num_original].logsumexp(-1)
        return next_token + self.gamma * lpr.mean(), next_token
