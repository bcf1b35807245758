"""Megatron's Gated DeltaNet, the linear attention of hybrid models, with documents that are kept apart."""

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as MegatronGatedDeltaNet
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moelpr.model.layers import delta_rule


class GatedDeltaNet(MegatronGatedDeltaNet):
    """Linear attention whose state is read and changed by the gated delta rule.

    Its output norm scales by the weight itself, also where the other norms of the model scale by 1 plus their weight.
    """

    def __init__(self, config: TransformerConfig, submodules: GatedDeltaNetSubmodules, **kwargs: Any) -> None:
        delta_rule.install()
        super().__init__(config, submodules, **kwargs)
        if config.layernorm_zero_centered_gamma:
            plain = copy.copy(config)
            plain.layernorm_zero_centered_gamma = False
            eps = config.layernorm_epsilon
            self.out_norm: Any = submodules.out_norm(plain, hidden_size=self.value_head_dim, eps=eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The layer's output and no bias.

        Args:
            hidden_states: [sequence, batch, hidden].
            attention_mask: `document_edges` of the micro-batch, which the state does not cross; None: one document.
        """
        if attention_mask is None:
            return super().forward(hidden_states, None, *args, **kwargs)
        batch = hidden_states.shape[1]
        length = int(attention_mask[-1]) // batch  # hidden_states may be this rank's part of the sequence
        outputs = []
        for i in range(batch):  # Megatron keeps documents apart in one sequence only
            is_inside = (attention_mask >= i * length) & (attention_mask <= (i + 1) * length)
            edges = attention_mask[is_inside] - i * length
            kwargs["packed_seq_params"] = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)
            output, bias = super().forward(hidden_states[:, i : i + 1], None, *args, **kwargs)
            outputs.append(output)
        return torch.cat(outputs, dim=1), bias
