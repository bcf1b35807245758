import argparse
import gc
import importlib
import inspect
import pkgutil
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import megatron.core
import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.hybrid import hybrid_layer_allocation
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.parallel_state import get_tensor_and_context_parallel_group
from megatron.core.rerun_state_machine import RerunMode, destroy_rerun_state_machine, initialize_rerun_state_machine
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.utils import local_multi_tensor_l2_norm
from megatron.training import checkpointing, ft_integration, global_vars, training
from megatron.training.checkpointing import maybe_msc
from torch.utils._python_dispatch import TorchDispatchMode

from moelpr.base import command
from moelpr.base.errors import MachineError
from moelpr.model.megatron import megatron_fixes, optimizer_fixes
from moelpr.model.megatron.optimizer_fixes import GroupStepAdam

pytestmark = pytest.mark.usefixtures("megatron")

DATASETS = Path(next(iter(megatron.core.__path__))) / "datasets"


OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
ON_HOST = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer"
# Functions and modules, and what their source contains as long as the fixes and the stand-ins for a GPU are needed.
NEEDED_BECAUSE = [
    (f"{OPTIMIZER}.state_dict", "if not HAVE_APEX_OR_TE:\n            steps = list(set("),
    (f"{OPTIMIZER}.sharded_param_state_dp_reshardable", "if key == 'step':"),
    (f"{OPTIMIZER}.load_parameter_state_from_dp_reshardable", "_and_optimizer_states(model_param, src_tensors)"),
    (f"{OPTIMIZER}._set_main_param_and_optimizer_states", "dst_tensors[key].copy_(tensors[key])"),
    (f"{ON_HOST}.__init__", '"cpu_optimizer_cls": cpu_optimizer_cls,'),
    (f"{ON_HOST}._set_sub_optimizer_grads", "gpu_param = self.cpu_copys_map_gpu_param[param]"),
    (f"{ON_HOST}._update_fp32_params_by_new_state", "self.param_to_fp32_param[param]"),
    ("megatron.training.ft_integration:setup", "args = arguments.parse_args(ignore_unknown_args=True)"),
    ("megatron.training.checkpointing:save_checkpoint", "with maybe_msc.open(tracker_filename, 'w') as f:"),
    ("megatron.training.checkpointing:save_checkpoint", "dist_checkpointing.save("),
    ("megatron.core.datasets.gpt_dataset:GPTDataset._build_document_sample_shuffle_indices", "numpy.save(path_to_"),
    ("megatron.core.datasets.blended_dataset:BlendedDataset._build_indices", "numpy.save(path_to_"),
    ("megatron.training.initialize:initialize_megatron", "allow_no_cuda"),
    ("megatron.training.initialize", "assert torch.cuda.is_available()"),
    ("megatron.training.initialize", "if device_count > 0"),
    ("megatron.training.initialize", 'device="cuda"'),
    ("megatron.training.training", " initialize_megatron("),
    ("megatron.training.training", " set_jit_fusion_options("),
    ("megatron.training.training", " report_memory("),
    ("megatron.training.utils.common_utils", "torch.cuda.memory_allocated()"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "set_device(rank % torch.cuda.device_count())"),
    ("megatron.core.tensor_parallel.random", "_cuda_setRNGState"),
    ("megatron.core.optimizer.distrib_optimizer", "'torch.cuda.FloatTensor'"),
    ("megatron.core.transformer.moe.moe_utils", "tensor.is_cuda"),
    ("megatron.core.transformer.moe.token_dispatcher", "torch.cuda.Stream()"),
    ("torch.distributed.checkpoint:FileSystemReader.read_metadata", "pickle.load("),
    ("torch.distributed.checkpoint:DefaultLoadPlanner.load_bytes", "weights_only=False"),
]


@pytest.mark.parametrize(("function", "text"), NEEDED_BECAUSE)
def test_megatron_and_torch_still_need_the_fix(function: str, text: str) -> None:
    assert text in inspect.getsource(inspect.unwrap(pkgutil.resolve_name(function)))


def test_the_wheel_still_has_a_built_helper_and_no_makefile(capfd: pytest.CaptureFixture[str]) -> None:
    utils.compile_helpers()
    assert "make" not in capfd.readouterr().err
    assert list(DATASETS.glob("helpers_cpp*.so"))
    assert not (DATASETS / "Makefile").exists(), "Megatron can build its helper: remove the fix"


def test_megatron_still_copies_into_optimizer_shards_with_gradients_enabled() -> None:
    copy = inspect.unwrap(DistributedOptimizer._set_main_param_and_optimizer_states)
    assert "no_grad" not in inspect.getsource(copy)


@pytest.mark.parametrize("optimizer", [FP32Optimizer, Float16OptimizerWithFloat16Params])
def test_megatron_still_expects_optimizer_state_from_a_rank_without_any(optimizer: Any) -> None:
    with pytest.raises(KeyError):
        inspect.unwrap(optimizer.load_state_dict)(None, {"optimizer": {"param_groups": []}, "param_groups": []})


def make_optimizer(kind: str, lr: float, min_lr: float, decoupled_lr: float) -> tuple[Any, Any]:
    """A small model and its optimizer after one step: weights that decay, norms that do not, and a vocabulary."""

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            self.weight, self.vocabulary = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
            # The norms before it are 4 elements of a bucket of 64, or 128.
            self.vocabulary.shared_embedding = True  # type: ignore[attr-defined]
            self.norm = torch.nn.Parameter(torch.ones(4))

    is_flat, dtype = kind.startswith("distributed"), torch.bfloat16 if kind == "float16" else torch.float32
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, params_dtype=dtype)
    model = Model(config).to(dtype)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=is_flat), model)
    dtypes = {"bf16": kind == "float16", "params_dtype": dtype, "use_distributed_optimizer": is_flat}
    optimizer_config = OptimizerConfig(optimizer="adam", lr=lr, min_lr=min_lr, **dtypes)
    overrides = {ParamKey(name="*norm"): {"wd_mult": 0.0}, ParamKey(name="*vocabulary"): {"max_lr": decoupled_lr}}
    optimizer = get_megatron_optimizer(optimizer_config, [chunk], overrides)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(lr)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["fp32", "float16", "distributed", "distributed, flat buffers"])
def test_optimizer_state_loads_with_other_learning_rates(kind: str, tmp_path: Path) -> None:
    """Through a checkpoint; --decoupled-lr too."""

    def sharded(model: Any, optimizer: Any, is_loading: bool = False) -> dict:
        metadata = {
            "distrib_optim_sharding_type": "dp_reshardable" if "buffers" in kind else "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        return optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=is_loading, metadata=metadata)

    def groups(optimizer: Any) -> list[tuple]:
        return [tuple(group[name] for name in ("wd_mult", "max_lr", "min_lr")) for group in optimizer.param_groups]

    def moments(optimizer: Any) -> list[torch.Tensor]:
        (inner,) = optimizer.chained_optimizers
        return [inner.optimizer.state[p]["exp_avg"] for group in inner.param_groups for p in group["params"]]

    model, optimizer = make_optimizer(kind, 1e-2, 1e-3, 0.5)
    dist_checkpointing.save(sharded(model, optimizer), str(tmp_path), async_strategy="mcore")
    model, loaded = make_optimizer(kind, 2e-2, 0.0, 0.25)
    expected = groups(loaded)
    loaded.load_state_dict(dist_checkpointing.load(sharded(model, loaded, is_loading=True), str(tmp_path)))
    assert groups(loaded) == expected and len(expected) == 3
    for one, other in zip(moments(loaded), moments(optimizer), strict=True):
        assert other.any() and torch.equal(one, other)


def test_megatron_still_finds_parameter_groups_by_their_learning_rates() -> None:
    saved, current = ({"params": [], "max_lr": lr} for lr in (0.1, 0.2))
    with pytest.raises(ValueError, match="Could not find parameter group"):
        MegatronOptimizer._filter_and_reorder_param_groups([current], [saved])


@pytest.mark.parametrize(
    ("flags", "expected"), [({}, 0), ({"no_load_optim": True}, 30), ({"no_load_optim": True, "finetune": True}, 0)]
)
def test_a_reset_optimizer_continues_the_schedule(flags, expected, monkeypatch) -> None:
    """The fix only; a function that loads nothing, like Megatron's for the schedule, takes the place of Megatron's."""
    settings = {"no_load_optim": False, "finetune": False, "consumed_train_samples": 40, "skipped_train_samples": 10}
    monkeypatch.setattr(training, "get_args", lambda: argparse.Namespace(**(settings | flags)))
    monkeypatch.setattr(training, "load_checkpoint", lambda model, optimizer, scheduler, strict=True: (3, 0))
    optimizer_fixes._continue_the_schedule_of_a_reset_optimizer()
    group = {"lr": 0.0, "max_lr": 1.0, "min_lr": 0.0}
    rates = dict(init_lr=0.0, max_lr=1.0, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=100, lr_decay_style="linear")
    decay = dict(start_wd=0.0, end_wd=0.0, wd_incr_steps=100, wd_incr_style="constant")
    scheduler = OptimizerParamScheduler(argparse.Namespace(param_groups=[group]), **rates, **decay)
    assert training.load_checkpoint([], None, scheduler, strict=False) == (3, 0)
    assert scheduler.num_steps == expected and group["lr"] == pytest.approx(1 - expected / 100)
    assert training.load_checkpoint([], None, None) == (3, 0)


def test_megatron_still_loads_the_schedule_with_the_optimizer_only() -> None:
    source = inspect.getsource(checkpointing.load_checkpoint)
    optimizer_part = source[source.index("and not args.no_load_optim:\n        try:") : source.index("# rerun state")]
    assert optimizer_part.count("opt_param_scheduler.load_state_dict") == source.count(
        "opt_param_scheduler.load_state_dict"
    )
    assert "load_checkpoint(\n            model,\n            optimizer,\n            opt_param_scheduler,\n" in (
        inspect.getsource(training.setup_model_and_optimizer)
    )


def test_stages_of_a_hybrid_model_may_have_any_number_of_layers() -> None:
    select, pipes = hybrid_layer_allocation.select_pipeline_segment, "*|***"
    with pytest.raises(ValueError, match="Cannot specify num_layers_in_first_pipeline_stage"):
        inspect.unwrap(select)(pipes, None, 1, first_stage_layers=1)
    assert select(pipes, None, 1, first_stage_layers=1) == (["*"] * 3, 1)


def test_a_checkpoint_is_loaded_into_a_hybrid_model_as_it_is() -> None:
    settings, load = argparse.Namespace(hybrid_layer_pattern=None), checkpointing._maybe_setup_gpt_to_hybrid_load
    given = settings, settings, [HybridModel.__new__(HybridModel)]
    with pytest.raises(RuntimeError, match="requires --hybrid-layer-pattern"):
        inspect.unwrap(load)(*given)
    assert load(*given) == (None, False)


@pytest.mark.parametrize(("name", "group"), [("load_balancing_loss", "reduce_group"), ("z_loss", "avg_group")])
def test_a_stage_without_routers_knows_the_group_of_the_others_losses(name: str, group: str) -> None:
    ours, theirs = MoEMetricsTracker(), MoEMetricsTracker()
    ours.ensure_initialized(name, 2)
    inspect.unwrap(MoEMetricsTracker.ensure_initialized)(theirs, name, 2)
    assert getattr(theirs.metrics[name], group) is None, "Megatron sets the group itself: remove the fix"
    assert getattr(ours.metrics[name], group) is get_tensor_and_context_parallel_group()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_with_one_step_count_per_group_equals_torchs_adam(decoupled: bool) -> None:
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    groups = [{"params": ours}, {"params": []}]
    adam = GroupStepAdam(groups, **settings, adam_w_mode=decoupled)
    reference = torch.optim.Adam(theirs, **settings, decoupled_weight_decay=decoupled)
    for step in range(5):
        if step == 3:  # through a checkpoint
            state = adam.state_dict()
            adam = GroupStepAdam(groups, **settings, adam_w_mode=decoupled)
            adam.load_state_dict(state)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        adam.step()
        reference.step()
    assert [group["step"] for group in adam.param_groups] == [5, 5]  # also of a group without parameters
    assert all("step" not in state for state in adam.state_dict()["state"].values())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_step_that_cannot_be_saved_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:  # noqa: ANN001
    """/dev/full rejects every write like a full disk; Megatron's own error is a list of tracebacks."""
    real_open = open

    def open_full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real_open("/dev/full" if str(path).endswith(".distcp") else path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", open_full)
    monkeypatch.setattr("sys.unraisablehook", command.show_unraisable)  # pytest has replaced it
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(30))}
    with pytest.raises(MachineError, match=f"{tmp_path} could not be saved .*GB free") as raised:
        dist_checkpointing.save(dict(state), str(tmp_path), async_strategy="mcore")
    assert "Traceback" not in str(raised.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OSError, match="No space left") as full:
        dist_checkpointing.save(dict(state), str(tmp_path), async_strategy="mcore")
    assert full.value.filename == str(tmp_path)
    del raised, full
    gc.collect()  # the streams that the failed writers left
    assert "Traceback" not in capfd.readouterr().err


def test_a_tracker_file_that_cannot_be_written_names_the_step_before(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for step in ("1", "2"):
        with maybe_msc.open(str(tracker), "w") as file:
            file.write(step)
        assert tracker.read_text() == step
    with pytest.raises(OSError, match="full"), maybe_msc.open(str(tracker), "w") as file:
        file.write("3")
        raise OSError("full")
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(tracker, "2")]


@pytest.mark.parametrize("name", ["gpt_dataset", "blended_dataset"])
def test_an_order_of_samples_is_saved_whole_or_not_at_all(tmp_path, name, monkeypatch) -> None:
    numpy = importlib.import_module(f"megatron.core.datasets.{name}").numpy
    order, path = np.arange(100), tmp_path / "cache" / "shuffle_index.npy"

    def save_half(file: Any, array: Any, **options: Any) -> None:
        file.write(bytes(50))
        raise OSError("full")

    with monkeypatch.context() as full, pytest.raises(OSError, match="full"):
        full.setattr(np, "save", save_half)
        numpy.save(str(path), order, allow_pickle=True)
    assert list(path.parent.iterdir()) == []
    numpy.save(str(path), order, allow_pickle=True)
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(numpy.load(path, allow_pickle=True, mmap_mode="r"), order)


def test_a_synchronous_save_starts_no_process_for_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    results = filesystem_async.get_write_results_queue()
    assert type(results) is queue.Queue and results is filesystem_async.get_write_results_queue()
    started = []
    monkeypatch.setattr(filesystem_async.mp, "get_context", lambda mode: started.append(mode) or MagicMock())
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace(async_save=True))
    filesystem_async.get_write_results_queue("fork")
    assert started == ["fork"]


def test_groups_without_parameters_count_the_steps_of_a_fused_optimizer() -> None:
    """As Transformer Engine's Adam does it; the step is read from the first stage's groups, which may be empty."""

    class FusedAdam(torch.optim.Optimizer):
        def step(self, closure: None = None) -> str:
            for group in (group for group in self.param_groups if group["params"]):
                group["step"] = group.get("step", 0) + 1
            return "result"

    adam = FusedAdam([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": []}], {})
    optimizer_fixes._count_steps_of_empty_groups(FusedAdam)
    assert [adam.step(), adam.step(closure=None)] == ["result"] * 2
    assert [group["step"] for group in adam.param_groups] == [2, 2]


class Reads(TorchDispatchMode):
    """Counts values that the host reads; on a GPU it waits for each."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_gradients_are_checked_without_waiting_in_the_backward_pass(value: float, overlap: bool) -> None:
    config = DistributedDataParallelConfig(overlap_grad_reduce=overlap, check_for_nan_in_grad=True, bucket_size=1)
    settings = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    model = DistributedDataParallel(settings, config, torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))))
    destroy_rerun_state_machine()  # another test may have started Megatron in this process
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    try:
        for first in (True, False):  # the first pass finds out in which order gradients come
            with Reads() as reads:
                model(torch.full((2, 4), 1.0 if first else value)).sum().backward()
                assert reads.number == 0
                if first or value == 1.0:
                    model.finish_grad_sync()
                else:
                    with pytest.raises(RuntimeError, match="Unexpected result"):
                        model.finish_grad_sync()
                assert reads.number <= 1 + (value != 1.0) * 2  # the message has the value
            model.zero_grad_buffer()
    finally:
        destroy_rerun_state_machine()


def test_the_gradient_norm_is_megatrons_and_is_read_once() -> None:
    tensors = [torch.randn(size) for size in (7, 1, 300)]
    with Reads() as reads:
        actual, _ = clip_grads.l2_norm_impl(2048, None, [tensors], False)
    assert reads.number == 0
    assert torch.equal(actual, local_multi_tensor_l2_norm(2048, None, [tensors], False)[0])


def test_nvrx_gets_the_settings_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MagicMock()
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"):
        monkeypatch.setitem(sys.modules, name, MagicMock(RankMonitorClient=lambda: client))
    flags = dict(enable_ft_package=True, save=tmp_path / "run", async_save=False, calc_ft_timeouts=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace(**flags, ft_num_warmup_iters=3))
    monkeypatch.setattr(ft_integration, "_GLOBAL_RANK_MONITOR_CLIENT", None)
    megatron_fixes.install()
    ft_integration.setup()
    client.init_workload_monitoring.assert_called_once_with(num_warmup_iters=3)
    client.start_section.assert_called_once_with("setup")


def test_torch_compiles_more_variants_with_a_gpu() -> None:
    code = "import torch; torch.cuda.is_available = lambda: True; from moelpr.model.megatron import megatron_fixes; "
    code += "megatron_fixes._let_compiled_functions_have_more_variants(); "
    code += "import threading, torch._dynamo.config as config; "
    code += "threading.Thread(target=lambda: print(config.recompile_limit)).start()"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) >= 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("channels", [8, 4], ids=["all channels turn", "half of them"])
def test_rotated_heads_and_their_gradient_are_megatrons(dtype, interleaved: bool, channels: int) -> None:
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    freqs, heads = torch.randn(5, 1, 1, channels), torch.randn(5, 2, 3, 8).to(dtype)
    actual = []
    for function in (inspect.unwrap(rotate), rotate):
        given = heads.clone().requires_grad_()
        output = function(given, freqs, rotary_interleaved=interleaved, mscale=0.5)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype))
        actual.append((output, given.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*actual, strict=True))


def test_cos_is_computed_once_for_all_layers_and_again_after_inference(monkeypatch) -> None:
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    calls, cos = [], torch.cos
    monkeypatch.setattr(torch, "cos", lambda freqs: (calls.append(freqs), cos(freqs))[1])
    freqs, heads = torch.randn(5, 1, 1, 8), torch.randn(5, 2, 3, 8)
    with torch.inference_mode():
        rotate(heads, freqs)
    for _ in range(4):
        rotate(heads.clone().requires_grad_(), freqs).sum().backward()
    assert len(calls) == 2
    rotate(heads, freqs, mscale=0.5)
    assert len(calls) == 3
