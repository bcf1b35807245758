"""A stand-in for Transformer Engine, written in plain torch, so that Megatron's layers on top of it run on a CPU.

It has the signatures of the version below, its parameters, its empty `_extra_state`, its refusals, and no FP8, no
tensor parallelism and no speed. `install` makes it importable; it has to run before Megatron is imported.
"""
# fmt: off
# Signatures are Transformer Engine's, with several parameters on a line.

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelpr.model.megatron.megatron_fixes import GroupStepAdam

VERSION = "2.20.2"


class _Module(torch.nn.Module):
    """The base of Transformer Engine's modules (TransformerEngineBaseModule)."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8, self.fp8_calibration = False, False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "the stub has no FP8"

    def _new_weight(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, device: Any, init: Callable | None
    ) -> None:
        weight = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype, device=device))
        self.register_parameter(name, weight)
        with torch.no_grad():
            (init or (lambda tensor: tensor.normal_(std=0.023)))(weight)


class _FusedProduct(torch.autograd.Function):
    """rows @ weight^T that adds the weight's gradient to its main_grad, and returns memory that nobody may read."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.weight = weight
        return torch.nn.functional.linear(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        ctx.weight.main_grad.add_(gradient.flatten(0, -2).T @ rows.flatten(0, -2))
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            ctx.weight.grad_added_to_main_grad = True
        return gradient @ weight, get_dummy_wgrad(list(weight.shape), weight.dtype)


def _product(rows: Tensor, weight: Tensor, fuse_wgrad_accumulation: bool) -> Tensor:
    if fuse_wgrad_accumulation and weight.requires_grad:
        return _FusedProduct.apply(rows, weight)
    return torch.nn.functional.linear(rows, weight)


def get_dummy_wgrad(shape: list, dtype: torch.dtype, zero: bool = False) -> Tensor:
    return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype)


class Linear(_Module):
    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None, rng_tracker_name: str | None = None,
        init_method: Callable | None = None, bias: bool = True, return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None, device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not return_bias, "not needed"
        self.in_features, self.out_features, self.parallel_mode = in_features, out_features, parallel_mode
        self.tp_size, self.use_bias, self.fuse_wgrad_accumulation = tp_size, bias, fuse_wgrad_accumulation
        self._new_weight("weight", (out_features, in_features), params_dtype, device, init_method)
        if bias:
            self._new_weight("bias", (out_features,), params_dtype, device, torch.nn.init.zeros_)
        else:
            self.bias = torch.Tensor()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        output = _product(inp, self.weight, self.fuse_wgrad_accumulation)
        return output + self.bias if self.use_bias else output


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None, init_method: Callable | None = None, bias: bool = True,
        normalization: str = "LayerNorm", return_bias: bool = False, params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None, return_layernorm_output: bool = False, zero_centered_gamma: bool = False,
        device: Any = "cuda", ub_name: str | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
            init_method=init_method, bias=bias, return_bias=return_bias, params_dtype=params_dtype,
            parallel_mode=parallel_mode, device=device,
        )
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        self.eps = eps
        self._new_weight("layer_norm_weight", (in_features,), params_dtype, device, torch.nn.init.ones_)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(_rms_norm(inp, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    """One parameter per expert: weight0, weight1, …"""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None, rng_tracker_name: str | None = None,
        init_method: Callable | None = None, bias: bool = True, return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None, device: Any = "cuda",
        ub_name: str | None = None, single_grouped_weight: bool = False, single_grouped_bias: bool = False,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not bias and not return_bias and not single_grouped_weight, "not needed"
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.fuse_wgrad_accumulation, self.tp_size = bias, fuse_wgrad_accumulation, tp_size
        for number in range(num_gemms):
            self._new_weight(f"weight{number}", (out_features, in_features), params_dtype, device, init_method)

    def forward(self, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
        splits = m_splits.tolist() if isinstance(m_splits, Tensor) else m_splits
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        return torch.cat(
            [
                _product(rows, weight, self.fuse_wgrad_accumulation)
                for rows, weight in zip(inp.split(splits), weights, strict=True)
            ]
        )


class RMSNorm(_Module):
    def __init__(
        self, normalized_shape: int | None = None, eps: float = 1e-5, sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None, zero_centered_gamma: bool = False, hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert normalized_shape is not None and not zero_centered_gamma
        self.eps = eps
        self._new_weight("weight", (normalized_shape,), params_dtype, kwargs.get("device"), torch.nn.init.ones_)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input_: Tensor) -> Tensor:
        return _rms_norm(input_, self.weight, self.eps)


def _rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(rows, weight.shape, weight, eps)


class DotProductAttention(_Module):
    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int], num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None, sequence_parallel: bool = False, tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None, tp_group: Any = None, layer_number: int | None = None,
        attention_type: str = "self", cp_comm_type: str = "p2p", softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert qkv_format == "sbhd" and attention_dropout == 0 and window_size is None, "not needed"
        self.softmax_scale = softmax_scale
        self.register_load_state_dict_post_hook(self._do_not_miss_the_extra_state)

    @staticmethod
    def _do_not_miss_the_extra_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
        """Older checkpoints have none of this module; nor do Megatron's."""
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if "core_attention._extra_state" not in key]

    def forward(
        self, query_layer: Tensor | None = None, key_layer: Tensor | None = None, value_layer: Tensor | None = None,
        attention_mask: Tensor | None = None, qkv_format: str | None = None, attn_mask_type: str | None = None,
    ) -> Tensor:
        assert query_layer is not None and key_layer is not None and value_layer is not None
        assert attn_mask_type == "causal", "not needed"
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_layer, key_layer, value_layer))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3).flatten(start_dim=2)


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    assert num_out_tokens > 0, f"moe_permute (mask map) requires num_out_tokens > 0, got {num_out_tokens}."
    experts, tokens = routing_map.T.nonzero(as_tuple=True)
    return inp.index_select(0, tokens), probs[tokens, experts], tokens


def moe_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None, restore_shape: Any = None,
    map_type: str = "mask", probs: Tensor | None = None, pad_offsets: Tensor | None = None,
) -> Tensor:
    if not inp.numel():
        return inp.clone()
    assert merging_probs is None and probs is None and pad_offsets is None, "not needed"
    return torch.zeros(restore_shape, dtype=inp.dtype).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        moe_sort_chunks_by_index(inp, split_sizes, sorted_index),
        moe_sort_chunks_by_index(probs, split_sizes, sorted_index),
    )


def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("Megatron's dispatcher passes the gate weights too")


def fused_topk_with_score_function(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: int | None, group_topk: int | None,
    scaling_factor: float | None, score_function: str, expert_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    assert not use_pre_softmax and not num_groups and not scaling_factor and expert_bias is None, "not needed"
    assert score_function == "softmax"
    best = torch.topk(logits, topk, dim=-1)
    probs = torch.zeros_like(logits).scatter(-1, best.indices, torch.softmax(best.values, dim=-1))
    return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best.indices, True)


def fused_compute_score_for_moe_aux_loss(logits: Tensor, topk: int, score_function: str) -> tuple[Tensor, Tensor]:
    assert score_function == "softmax"
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    indices = torch.topk(logits, topk, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True), scores


def fused_moe_aux_loss(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: int, num_experts: int, topk: int, coeff: float
) -> Tensor:
    share = (probs.sum(dim=0) * tokens_per_expert).sum()
    return share * num_experts * coeff / (topk * total_num_tokens * total_num_tokens)


class CudaRNGStatesTracker:
    def reset(self) -> None:
        pass


class DelayedScaling:
    pass


class FusedAdam(GroupStepAdam):
    """Like GroupStepAdam, it keeps one step count per group of parameters."""

    def __init__(
        self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, adam_w_mode: bool = True, capturable: bool = False,
    ) -> None:
        super().__init__(params, adam_w_mode, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def multi_tensor_applier(op: Callable, noop_flag_buffer: Tensor, tensor_lists: list, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list, per_tensor: bool = False) -> tuple:
    return torch.stack([tensor.norm() for tensor in tensor_lists[0]]).norm().reshape(1), None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def install() -> None:
    """Make `import transformer_engine` find this stub."""
    empty = type("Empty", (), {})
    permutations = (
        moe_permute, moe_permute_with_probs, moe_unpermute, moe_sort_chunks_by_index,
        moe_sort_chunks_by_index_with_probs,
    )
    router = (fused_topk_with_score_function, fused_compute_score_for_moe_aux_loss, fused_moe_aux_loss)
    layers = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention)
    modules: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": DelayedScaling},
        ".pytorch": {"LayerNorm": empty} | {layer.__name__: layer for layer in layers},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": CudaRNGStatesTracker, "activation_recompute_forward": None,
        },
        ".pytorch.fp8": {"FP8GlobalStateManager": empty, "fp8_autocast": None, "fp8_model_init": None},
        ".pytorch.module": {},
        ".pytorch.module.base": {"get_dummy_wgrad": get_dummy_wgrad},
        ".pytorch.optimizers": {
            "FusedAdam": FusedAdam, "FusedSGD": torch.optim.SGD, "multi_tensor_applier": multi_tensor_applier,
            "multi_tensor_l2norm": multi_tensor_l2norm, "multi_tensor_scale": multi_tensor_scale,
        },
        ".pytorch.permutation": {function.__name__: function for function in permutations},
        ".pytorch.router": {function.__name__: function for function in router},
        ".pytorch.tensor": {"QuantizedTensor": empty},
    }
    for suffix, names in modules.items():
        name = f"transformer_engine{suffix}"
        module = ModuleType(name, "A stub.")
        module.__dict__.update(names, __path__=[], __spec__=ModuleSpec(name, None, is_package=True))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
