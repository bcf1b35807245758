import inspect
from pathlib import Path

import megatron.core
import pytest
import torch

from moelpr.megatron_patches import megatron_fixes

DATASETS = Path(next(iter(megatron.core.__path__))) / "datasets"


def test_the_wheel_still_ships_a_built_helper_and_no_makefile() -> None:
    assert list(DATASETS.glob("helpers_cpp*.so"))
    assert not (DATASETS / "Makefile").exists(), "Megatron can build its helper itself: the fix may go"


def test_megatron_is_told_not_to_run_make(capfd) -> None:  # noqa: ANN001
    megatron_fixes.install()
    from megatron.core.datasets import utils

    utils.compile_helpers()
    assert "make" not in capfd.readouterr().err


def test_torchs_adam_still_keeps_its_step_where_a_rank_without_a_shard_finds_none() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    assert "if not HAVE_APEX_OR_TE:\n            steps = list(set(" in inspect.getsource(
        DistributedOptimizer.state_dict
    )


def test_megatron_still_copies_into_optimizer_shards_with_gradients_on() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    copy = inspect.unwrap(DistributedOptimizer._set_main_param_and_optimizer_states)
    assert "dst_tensors[key].copy_(tensors[key])" in inspect.getsource(copy)
    assert "no_grad" not in inspect.getsource(copy)


def test_megatron_still_wants_optimizer_state_of_a_rank_that_has_none() -> None:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for optimizer in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        load = inspect.unwrap(optimizer.load_state_dict)
        assert "['state']:" in inspect.getsource(load)
        with pytest.raises(KeyError):
            load(None, {"optimizer": {"param_groups": []}, "param_groups": []})


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_with_one_step_count_per_group_moves_parameters_as_torchs_own(decoupled: bool) -> None:
    from moelpr.megatron_patches.adam import GroupStepAdam

    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    adam = GroupStepAdam(ours, **settings, adam_w_mode=decoupled)
    reference = torch.optim.Adam(theirs, **settings, decoupled_weight_decay=decoupled)
    for step in range(5):
        if step == 3:  # through a checkpoint
            state = adam.state_dict()
            adam = GroupStepAdam(ours, **settings, adam_w_mode=decoupled)
            adam.load_state_dict(state)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        adam.step()
        reference.step()
    assert adam.state_dict()["param_groups"][0]["step"] == 5
    assert all("step" not in state for state in adam.state_dict()["state"].values())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_group_without_parameters_counts_its_steps_too() -> None:
    from moelpr.megatron_patches.adam import GroupStepAdam

    adam = GroupStepAdam(
        [{"params": []}, {"params": [torch.nn.Parameter(torch.ones(1))]}],
        lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    adam.step()
    assert [group["step"] for group in adam.param_groups] == [1, 1]
