"""tests/distributed/test_layouts.py trains with the fixes; here: Megatron still needs them."""

import inspect

from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def test_megatron_still_looks_up_each_parameter_among_those_of_a_gpu() -> None:
    step = inspect.getsource(HybridDeviceOptimizer._set_sub_optimizer_grads)
    assert "gpu_param = self.cpu_copys_map_gpu_param[param]" in step
    assert "self.param_to_fp32_param[param]" in inspect.getsource(
        HybridDeviceOptimizer._update_fp32_params_by_new_state
    )


def test_groups_still_name_classes() -> None:
    assert '"cpu_optimizer_cls": cpu_optimizer_cls,' in inspect.getsource(HybridDeviceOptimizer.__init__)


def test_the_flat_format_still_loads_a_step_count_that_was_not_saved() -> None:
    save = inspect.getsource(inspect.unwrap(DistributedOptimizer.sharded_param_state_dp_reshardable))
    load = inspect.getsource(inspect.unwrap(DistributedOptimizer.load_parameter_state_from_dp_reshardable))
    assert "if key == 'step':" in save and "self._set_main_param_and_optimizer_states(model_param, src_tensors)" in load
