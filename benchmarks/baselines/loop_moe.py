"""MoE-LPR in a simple implementation: transformers' Qwen2, each FFN replaced by a Python loop over E experts.

Does what the published code does on top of a trainer for dense models: the base is frozen with `requires_grad_(False)`,
each expert runs on the rows `torch.where` finds and is added back with `index_add_`, the losses are computed from the
router logits of all layers, and AdamW updates the trainable parameters. Uses torch's fused AdamW, the fastest without
additional packages. The first P experts are the original ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from moelpr.model.families.families import explicit_shape, rope_parameters
from moelpr.model.model_spec import ModelSpec, MoeSpec


class LoopMoE(torch.nn.Module):
    """[batch, sequence, hidden] in and out; keeps its router logits [T, E] in `logits_TE` for the losses."""

    def __init__(self, config: Qwen2Config, moe: MoeSpec) -> None:
        super().__init__()
        self.topk, self.num_original = moe.topk, moe.num_original_places
        self.gate = torch.nn.Linear(config.hidden_size, moe.num_experts, bias=False)
        self.experts = torch.nn.ModuleList(Qwen2MLP(config) for _ in range(moe.num_experts))
        self.logits_TE: Tensor | None = None

    def gating(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, E]."""
        return torch.nn.functional.linear(hidden_TH.float(), self.gate.weight.float())

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1)
        self.logits_TE = self.gating(hidden_TH)
        scores_TE = torch.softmax(self.logits_TE, dim=-1)
        weights_TK, choices_TK = torch.topk(scores_TE, self.topk, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(hidden_TH.dtype)
        output_TH = torch.zeros_like(hidden_TH)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(choices_TK == index)
            output = expert(hidden_TH.index_select(0, rows)) * weights_TK[rows, slots, None]
            output_TH.index_add_(0, rows, output)
        return output_TH.view_as(hidden_BSH)


def build(spec: ModelSpec) -> Qwen2ForCausalLM:
    """A randomly initialized model of `spec`'s shape, every layer an MoE layer, in spec.dtype."""
    args, moe = spec.megatron_args, spec.moe
    assert moe is not None and len(moe.layers) == args["num_layers"]
    fields = explicit_shape(spec) | {"vocab_size": args["vocab_size"], "rope_parameters": rope_parameters(spec)}
    fields["tie_word_embeddings"] = not args["untie_embeddings_and_output_weights"]
    config = Qwen2Config(**fields, use_cache=False, attn_implementation="sdpa")
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = LoopMoE(config, moe)
    return model.to(getattr(torch, spec.dtype))


def freeze(model: Qwen2ForCausalLM, stage: str) -> None:
    """stage1: routers and new experts train; stage2: only routers."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(True)
        if stage == "stage1":
            layer.mlp.experts[layer.mlp.num_original :].requires_grad_(True)


def loss(
    model: Qwen2ForCausalLM, tokens_BS: Tensor, labels_BS: Tensor, is_original_BS: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """(what is minimized, its next-token part).

    Args:
        alpha: weight of the balance loss, the mean over layers of sum_i (E / T) x (rows of expert i) x (mean score of
            i), as the published code scales it.
        gamma: weight of the LPR loss, the mean over layers and original-language tokens of -log score of the original
            experts.
    """
    logits = model(tokens_BS).logits.float()
    total = next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten())
    is_original_T = is_original_BS.flatten()
    layers = [layer.mlp for layer in model.model.layers]
    if alpha:
        total = total + alpha / len(layers) * sum(_balance(moe.logits_TE, moe.topk) for moe in layers)
    if gamma:
        total = total + gamma / len(layers) * sum(
            _lpr(moe.logits_TE[is_original_T], moe.num_original) for moe in layers
        )
    return total, next_token


def _balance(logits_TE: Tensor, topk: int) -> Tensor:
    scores_TE = torch.softmax(logits_TE, dim=-1)
    choices_TK = torch.topk(scores_TE, topk, dim=-1).indices
    num_tokens, num_experts = logits_TE.shape
    share_E = torch.nn.functional.one_hot(choices_TK, num_experts).float().sum(dim=(0, 1)) / num_tokens
    return num_experts * (share_E * scores_TE.mean(dim=0)).sum()


def _lpr(logits_TE: Tensor, num_original: int) -> Tensor:
    return (logits_TE.logsumexp(dim=1) - logits_TE[:, :num_original].logsumexp(dim=1)).mean()


class PeerStep:
    """One training step of a frozen model of transformers: forward, backward, clip at norm 1, AdamW."""

    def __init__(self, model: Any, stage: str, batch: dict[str, Tensor], weight_decay: float) -> None:
        self.model, self.batch = model.to(batch["tokens"].device).train(), batch
        self.alpha, self.gamma = (0.01, 0.0) if stage == "stage1" else (0.0, 0.1)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        adam: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.trainable, **adam, fused=True)

    def loss(self) -> tuple[Tensor, Tensor]:
        """(what is minimized, its next-token part)."""
        raise NotImplementedError

    def __call__(self) -> float:
        """Run the step; returns the next-token loss before it."""
        total, next_token = self.loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return next_token.item()


class LoopStep(PeerStep):
    """A step of the loop's model."""

    def __init__(self, spec: ModelSpec, stage: str, batch: dict[str, Tensor]) -> None:
        model = build(spec)
        freeze(model, stage)
        super().__init__(model, stage, batch, weight_decay=0.1)

    @property
    def routers(self) -> list[LoopMoE]:
        return [layer.mlp for layer in self.model.model.layers]

    def loss(self) -> tuple[Tensor, Tensor]:
        tokens, labels, is_original = (self.batch[name] for name in ("tokens", "labels", "is_original"))
        return loss(self.model, tokens, labels, is_original.bool(), self.alpha, self.gamma)
