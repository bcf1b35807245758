"""A stand-in for Transformer Engine, written in plain torch, so that Megatron's layers on top of it run on a CPU.

It has the parameters of the version below, its empty `_extra_state`, its refusals, and no FP8, no tensor parallelism
and no speed. Of the arguments, it names those that it uses. `install` makes it importable; call it before Megatron is
imported.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelpr.model.megatron.optimizer_fixes import GroupStepAdam

VERSION = "2.20.2"


class _Module(torch.nn.Module):
    """The base of Transformer Engine's modules (TransformerEngineBaseModule); its attributes are its arguments."""

    in_features: int
    out_features: int
    num_gemms: int
    eps: float
    fuse_wgrad_accumulation: bool

    def __init__(self, bias: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.use_bias, self.fp8, self.fp8_calibration = bias, False, False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        refused = "return_bias return_layernorm_output zero_centered_gamma single_grouped_weight single_grouped_bias"
        assert not any(map(arguments.get, refused.split())) and arguments.get("tp_size", 1) == 1, "not needed"
        for name, value in arguments.items():
            setattr(self, name, value)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "the stub has no FP8"

    def _new_weight(self, name: str, *shape: int, init: Callable | None = None) -> None:
        options = {"dtype": getattr(self, "params_dtype", None), "device": getattr(self, "device", "cuda")}
        weight = torch.nn.Parameter(torch.full(shape, torch.nan, **options))
        self.register_parameter(name, weight)
        with torch.no_grad():
            (init or getattr(self, "init_method", None) or torch.nn.init.normal_)(weight)


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
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._new_weight("weight", self.out_features, self.in_features)
        if self.use_bias:
            self._new_weight("bias", self.out_features, init=torch.nn.init.zeros_)
        else:
            self.bias = torch.Tensor()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        output = _product(inp, self.weight, self.fuse_wgrad_accumulation)
        return output + self.bias if self.use_bias else output


class LayerNormLinear(Linear):
    def __init__(self, normalization: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert normalization == "RMSNorm"
        self._new_weight("layer_norm_weight", self.in_features, init=torch.nn.init.ones_)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(_rms_norm(inp, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    """One parameter per expert: weight0, weight1, …"""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert not self.use_bias, "not needed"
        for number in range(self.num_gemms):
            self._new_weight(f"weight{number}", self.out_features, self.in_features)

    def forward(self, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
        splits = m_splits.tolist() if isinstance(m_splits, Tensor) else m_splits
        parts = [
            _product(rows, getattr(self, f"weight{number}"), self.fuse_wgrad_accumulation)
            for number, rows in enumerate(inp.split(splits))
        ]
        return torch.cat(parts)


class RMSNorm(_Module):
    def __init__(self, normalized_shape: int, sequence_parallel: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._new_weight("weight", normalized_shape, init=torch.nn.init.ones_)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input_: Tensor) -> Tensor:
        return _rms_norm(input_, self.weight, self.eps)


def _rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(rows, weight.shape, weight, eps)


class DotProductAttention(_Module):
    softmax_scale: float | None = None

    def __init__(
        self, attention_dropout: float, qkv_format: str = "sbhd", window_size: object = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        assert qkv_format == "sbhd" and attention_dropout == 0 and window_size is None, "not needed"
        self.register_load_state_dict_post_hook(self._do_not_miss_the_extra_state)

    @staticmethod
    def _do_not_miss_the_extra_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
        """Older checkpoints have none of this module; nor do Megatron's."""
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if "core_attention._extra_state" not in key]

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, *_: Any, attn_mask_type: str, **__: Any
    ) -> Tensor:
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


def moe_unpermute(inp: Tensor, row_id_map: Tensor, *, restore_shape: Any, **others: Any) -> Tensor:
    if not inp.numel():
        return inp.clone()
    assert others.pop("map_type", "mask") == "mask" and not any(value is not None for value in others.values())
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
    logits: Tensor, topk: int, score_function: str, use_pre_softmax: bool, **others: Any
) -> tuple[Tensor, Tensor]:
    assert score_function == "softmax" and not use_pre_softmax and not any(value for value in others.values())
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
    """Like GroupStepAdam, it keeps one step count per group of parameters.

    With `store_param_remainders`, a weight in bf16 and 16 bits in its state are its master in fp32, and the moments are
    in bf16.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(params, adam_w_mode, **settings)
        assert master_weights == use_decoupled_grad == store_param_remainders, "not needed"
        self.store_param_remainders = store_param_remainders
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.int16}
        moments = torch.bfloat16 if store_param_remainders else torch.float32
        assert (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype) == (moments, moments, torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:
        if not self.store_param_remainders:
            return super().step(closure)
        groups = self.param_groups
        for group in groups:
            for weight in group["params"]:
                master = self._master(weight)
                self.param_groups = [group | {"params": [master]}]
                super().step()
                bits = master.view(torch.int32)
                rounded = (bits + 2**15) >> 16
                weight.view(torch.int16).copy_(rounded)
                self.state[weight]["master_param"].copy_(bits - (rounded << 16))
                for name, moment in self.state.pop(master).items():
                    self.state[weight][name].copy_(moment)
            group["step"] = group.get("step", 0) + 1
        self.param_groups = groups

    def _master(self, weight: Tensor) -> Tensor:
        """The master, with the weight's gradient and moments in fp32."""
        state = self.initialize_state(weight, store_param_remainders=True)
        bits = (weight.view(torch.int16).int() << 16) + state["master_param"].int()
        master = bits.view(torch.float32)
        gradient = getattr(weight, "decoupled_grad", None)
        master.grad = None if gradient is None else gradient.float()
        self.state[master] = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        return master

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> dict[str, Tensor]:
        assert param.dtype == torch.bfloat16 and store_param_remainders, "not needed"
        for name, dtype in self.dtypes.items():
            self.state[param].setdefault(name, torch.zeros_like(param, dtype=dtype))
        return self.state[param]

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        state = self.state[param][state_name]
        return state.float() if state.dtype == torch.bfloat16 else state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        assert unscaled_state.dtype == (torch.int16 if state_name == "master_param" else torch.float32)
        self.state[param].setdefault(state_name, torch.empty_like(param, dtype=self.dtypes[state_name]))
        self.state[param][state_name].copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        for state in content["state"].values() if self.store_param_remainders else ():
            state |= {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # in the dtype of the weight
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, values in state_dict["state"].items() if self.store_param_remainders else ():
            self.state[weights[number]] = {}
            for name, value in values.items():
                self.set_scaled_state(weights[number], name, value if name == "master_param" else value.float())


def multi_tensor_applier(op: Callable, noop_flag_buffer: Tensor, tensor_lists: list, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list, per_tensor: bool = False) -> tuple:
    return torch.stack([tensor.norm() for tensor in tensor_lists[0]]).norm().reshape(1), None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


_CONTENT = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention, CudaRNGStatesTracker, DelayedScaling)
_CONTENT += (get_dummy_wgrad, FusedAdam, multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale)
_CONTENT += (moe_permute, moe_permute_with_probs, moe_unpermute, moe_sort_chunks_by_index)
_CONTENT += (moe_sort_chunks_by_index_with_probs, fused_topk_with_score_function)
_CONTENT += (fused_compute_score_for_moe_aux_loss, fused_moe_aux_loss)


def install() -> None:
    """Make `import transformer_engine` find this stub, whose modules all have the names of all."""
    names: dict[str, Any] = {one.__name__: one for one in _CONTENT}
    names |= dict.fromkeys(("LayerNorm", "FP8GlobalStateManager", "QuantizedTensor"), type("Empty", (), {}))
    names |= dict.fromkeys(("activation_recompute_forward", "fp8_autocast", "fp8_model_init"))
    names |= {"__version__": VERSION, "FusedSGD": torch.optim.SGD, "__path__": []}
    pytorch = "distributed fp8 module module.base optimizers permutation router tensor".split()
    for suffix in ("", ".common", ".common.recipe", ".pytorch", *(f".pytorch.{module}" for module in pytorch)):
        name = f"transformer_engine{suffix}"
        module = ModuleType(name, "A stub.")
        module.__dict__.update(names, __spec__=ModuleSpec(name, None, is_package=True))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
