"""Megatron's functions that would ask a GPU, and the numbers of rows that a router would choose."""

import functools
import sys
import types
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moelpr.train.check.fake_cuda import DEVICE
from moelpr.train.check.meter import Meter

# Functions that torch.compile makes one kernel of on a GPU, by module.
_COMPILED = {
    "fused_bias_swiglu": "swiglu swiglu_back weighted_swiglu weighted_swiglu_back",
    "fused_bias_dropout": "bias_dropout_add_fused_train",
    "fused_loss": "summarize to_gradient",
}


def install(meter: Meter) -> None:
    """Replace them for good. Import Megatron before."""
    import megatron.core.fusions.fused_bias_dropout as fused_bias_dropout
    import megatron.core.fusions.fused_bias_swiglu as fused_bias_swiglu
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.rerun_state_machine as rerun_state_machine
    import megatron.core.tensor_parallel.random as random
    import megatron.training.training as training

    from moelpr.model.layers import fused_loss
    from moelpr.model.layers.builder import MoELPRModelBuilder
    from moelpr.model.megatron.megatron_fixes import Rotation

    random._set_cuda_rng_state = lambda *args, **kwargs: None  # it writes the generator's state directly
    training.set_jit_fusion_options = lambda *args, **kwargs: None
    training.report_memory = lambda *args, **kwargs: None
    # Steps without a line in the log are counted; hooks read its signature.
    training.training_log = functools.wraps(training.training_log)(lambda *args, **kwargs: False)
    build = MoELPRModelBuilder.build_model

    def build_on_device(*args: Any, **kwargs: Any) -> Any:
        with DEVICE:
            return build(*args, **kwargs)

    MoELPRModelBuilder.build_model = build_on_device  # type: ignore[method-assign]
    # A module cannot be moved to a fake GPU, but it is there already, in the dtype of its configuration.
    for name in ("cuda", "bfloat16", "half"):
        setattr(torch.nn.Module, name, lambda self, device=None: self)
    for module in (fused_bias_swiglu, fused_bias_dropout, fused_loss):
        for name in _COMPILED[module.__name__.rpartition(".")[2]].split():
            setattr(module, name, meter.as_one_kernel(name, getattr(module, name)))

    Rotation.turn = meter.as_one_kernel("turn", Rotation.turn)
    # Its verdict is meaningless without values; only its waits count.
    rerun_state_machine.RerunStateMachine.validate_result = lambda self, result, is_wrong, *_, **__: is_wrong(result)
    has_group = optimizer.MegatronOptimizer.has_grad_norm_group

    def has_no_group(self: Any, group: str) -> bool:
        """All ranks agree on False: no model here has such a group."""
        has_group(self, group)
        return False

    optimizer.MegatronOptimizer.has_grad_norm_group = has_no_group
    for name, phase in (("forward_step", "forward"), ("backward_step", "backward")):
        setattr(schedules, name, meter.as_phase(phase, getattr(schedules, name)))
    for kind in (optimizer.ChainedOptimizer, optimizer.MixedPrecisionOptimizer, optimizer.FP32Optimizer):
        kind.step = meter.as_phase("optimizer", kind.step)


def keep_moments_in_bf16(meter: Meter) -> None:
    """Use the state of Transformer Engine's Adam with --bf16-moments, and one kernel that updates it."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import distrib_optimizer

    class FusedAdam(torch.optim.Optimizer):
        def __init__(
            self,
            params: Any,
            exp_avg_dtype: torch.dtype,
            exp_avg_sq_dtype: torch.dtype,
            master_weight_dtype: torch.dtype,
            use_decoupled_grad: bool,
            **defaults: Any,
        ) -> None:
            super().__init__(params, defaults)
            self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.int16}

        def step(self, *_: Any) -> None:  # type: ignore[override]
            weights = [weight for group in self.param_groups for weight in group["params"]]
            for weight in weights:
                for name in self.dtypes.keys() - self.state[weight]:
                    self.state[weight][name] = torch.empty_like(weight, dtype=self.dtypes[name])
            state = [one for weight in weights for one in (weight.decoupled_grad, *self.state[weight].values())]
            meter.note_kernel("_fused_adam", [*weights, *state], 0)

    utils._te_version = utils.PkgVersion("2.1.0")
    sys.modules["transformer_engine.pytorch.optimizers"] = types.SimpleNamespace(FusedAdam=FusedAdam)  # type: ignore
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam


def route_uniformly(rows: int) -> None:
    """Give the dispatcher's numbers on the host their values: each rank sends each new expert `rows` rows."""
    import megatron.core.transformer.moe.token_dispatcher as megatron_dispatcher

    from moelpr.model.layers.layer import NewExpertsDispatcher as Dispatcher

    initialize, preprocess = Dispatcher.__init__, Dispatcher.preprocess
    copy_to_host, sort = megatron_dispatcher.maybe_move_tensor_to_cpu, megatron_dispatcher.sort_chunks_by_idxs
    values: dict[int, int] = {}

    def initialize_with_values(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():  # it has indices on the host
            initialize(self, *args, **kwargs)

    def preprocess_and_note_values(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = preprocess(self, routing_map)
        sent = rows * self.num_experts
        if isinstance(self.num_out_tokens, int):
            self.num_out_tokens = sent  # a rounded number
        numbers = dict(num_out_tokens=sent, output_splits_tp=sent, input_splits=sent // self.ep_size)
        numbers |= dict(output_splits=sent // self.ep_size, num_global_tokens_per_local_expert=rows)
        values.clear()
        values.update({id(getattr(self, name, None)): value for name, value in numbers.items()})
        values[id(tokens_per_expert)] = rows * self.ep_size * self.tp_size
        return tokens_per_expert

    def copy_with_values(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(tensor) or tensor.device.type != "cuda":
            return tensor
        copy_to_host(tensor)
        with unset_fake_temporarily():
            value = torch.full(tensor.shape, values[id(tensor)])
            return value.numpy() if as_numpy else value

    def sort_known(tensor: torch.Tensor, split_sizes: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        known = types.SimpleNamespace(tolist=lambda: [rows] * split_sizes.numel())
        return sort(tensor, known, *args, **kwargs)

    megatron_dispatcher.maybe_move_tensor_to_cpu = copy_with_values
    megatron_dispatcher.sort_chunks_by_idxs = sort_known
    Dispatcher.__init__, Dispatcher.preprocess = initialize_with_values, preprocess_and_note_values  # type: ignore[method-assign]
