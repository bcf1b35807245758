"""MoE-LPR in stock transformers: its MoE class with grouped_mm, and a mask for the gradient of the original experts.

What a user can do with `transformers` alone: freeze everything but routers and experts, and set the gradient of the
first P experts, which are stacked with the others, to zero. The balance loss is that of transformers, which pools the
layers. Without weight decay, which would move the masked experts.
"""

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.baselines.loop_moe import PeerStep
from moelpr.model.families.families import family_named
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
        scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float)
        weights_TK, choices_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), choices_TK


def build(spec: ModelSpec) -> Any:
    """A randomly initialized model of `spec`'s shape, every layer an MoE layer, in spec.dtype."""
    family = family_named(spec.family)
    stock = getattr(transformers, family.moe_class.architecture)
    config = stock.config_class(**family.export_config({}, spec, spec.dtype), use_cache=False)
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the shared expert has size 0
        model = stock(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=config.initializer_range)
        layer.mlp.gate.__class__ = type("Router", (Router, type(layer.mlp.gate)), {})
    return model.to(getattr(torch, spec.dtype))


def freeze(model: Any, stage: str, num_original: int) -> None:
    """stage1: routers and new experts train; stage2: only routers."""

    def mask(gradient: Tensor) -> Tensor:
        gradient[:num_original].zero_()
        return gradient

    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(True)
        if stage == "stage1":
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.requires_grad_(True)
                weight.register_hook(mask)


class StockStep(PeerStep):
    """A step of the stock model."""

    def __init__(self, spec: ModelSpec, stage: str, batch: dict[str, Tensor]) -> None:
        assert spec.moe is not None and len(spec.moe.layers) == spec.megatron_args["num_layers"]
        model, self.num_original = build(spec), spec.moe.num_original_places
        freeze(model, stage, self.num_original)
        super().__init__(model, stage, batch, weight_decay=0)

    @property
    def routers(self) -> list[Router]:
        return [layer.mlp.gate for layer in self.model.model.layers]

    def loss(self) -> tuple[Tensor, Tensor]:
        output = self.model(self.batch["tokens"], output_router_logits=True)
        next_token = torch.nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), self.batch["labels"].flatten()
        )
        if self.alpha:
            return next_token + self.alpha * output.aux_loss, next_token
        is_original_T = self.batch["is_original"].bool().flatten()
        logits_LTE = torch.stack(output.router_logits)[:, is_original_T].float()
        lpr = logits_LTE.logsumexp(-1) - logits_LTE[..., : self.num_original].logsumexp(-1)
        return next_token + self.gamma * lpr.mean(), next_token
