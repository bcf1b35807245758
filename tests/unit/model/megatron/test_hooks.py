import argparse
import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import OptimizerConfig, ParamKey, _get_param_groups
from megatron.training import global_vars, training

from moelpr.model.megatron import hooks

pytestmark = pytest.mark.usefixtures("megatron")

ROOT = Path(__file__).parents[4]

# The functions that the hooks replace, and the argument names that they read.
READ_ARGUMENTS = {
    "training_log": {"loss_dict", "learning_rate", "iteration", "grad_norm"},
    "get_forward_backward_func": set(),
    "train": {"forward_step_func", "model", "config"},
    "evaluate_and_print_results": {"forward_step_func", "model", "config", "iteration"},
    "get_megatron_optimizer_config": set(),
    "num_floating_point_operations": {"batch_size"},
}


def calls_in(code: Any) -> set[str]:
    """The functions that the source of a module or function calls by their names."""
    nodes = ast.walk(ast.parse(inspect.getsource(code)))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def test_megatron_still_calls_the_functions_with_these_arguments() -> None:
    for name, arguments in READ_ARGUMENTS.items():
        assert arguments <= set(inspect.signature(getattr(training, name)).parameters), name
    assert READ_ARGUMENTS.keys() <= calls_in(training)


def test_megatron_still_offers_no_callbacks_of_its_own() -> None:
    names = set(inspect.signature(training.pretrain).parameters)
    assert not {name for name in names if "callback" in name or "hook" in name}, "use these instead of our hooks"


def test_megatron_logs_to_no_tracker_by_itself() -> None:
    assert "_set_wandb_writer" in calls_in(global_vars.set_global_variables)
    with hooks.without_wandb():
        global_vars._set_wandb_writer(argparse.Namespace(wandb_project="p", rank=0, world_size=1, wandb_exp_name=""))


def test_the_throughput_counts_the_given_operations() -> None:
    with hooks.operations_per_sequence(7.0):
        assert training.num_floating_point_operations(argparse.Namespace(), 3, total_real_tokens_in_batch=None) == 21


def test_parameters_with_the_attribute_do_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else Megatron's configuration says about them."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("embedding", "router")})
    model["embedding"].weight.marked = slice(0, 0)  # an empty slice marks too
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1)
    other = {ParamKey(name="embedding.*"): {"max_lr": 1.0}}
    monkeypatch.setattr(training, "get_megatron_optimizer_config", lambda args: (config, other))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda gathered, mine: gathered.__setitem__(0, mine))
    with hooks.without_weight_decay("marked"):
        actual, overrides = training.get_megatron_optimizer_config(None)
    groups = _get_param_groups([model], actual, overrides)
    assert [(group["wd_mult"], group["max_lr"], len(group["params"])) for group in groups] == [(1, 1e-3, 1), (0, 1, 1)]


def test_megatron_asks_the_signal_handler_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", None)
    args = SimpleNamespace(exit_signal_handler=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    handler = object()
    hooks.set_signal_handler(handler)
    assert training.get_signal_handler() is handler and args.exit_signal_handler
    assert "any(signal_handler.signals_received())" in inspect.getsource(training)


def patches_in(source: str) -> list[str]:
    """Assignments to attributes of what a module imports from megatron or torch."""
    nodes, imported = [*ast.walk(ast.parse(source))], set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (getattr(node, "module", None) or alias.name).split(".")[0] in ("megatron", "torch"):
                    imported.add(alias.asname or alias.name.split(".")[0])
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AugAssign | ast.AnnAssign)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    targets += [ast.Attribute(node.args[0], "set") for node in calls]
    names = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
    return [name for name in names if name.split(".")[0] in imported]


def test_megatron_and_torch_are_patched_only_in_this_package() -> None:
    files = [path for name in ("moelpr", "checkpoint_convert", "data_tools") for path in (ROOT / name).rglob("*.py")]
    actual = {path.relative_to(ROOT).as_posix() for path in files if patches_in(path.read_text())}
    assert "moelpr/model/megatron/cpu.py" in actual
    # A process of a dry run trains nothing: there, torch and Megatron are stand-ins from its start to its end.
    allowed = ("moelpr/model/megatron/", "moelpr/train/check/")
    assert {path for path in actual if not path.startswith(allowed)} == set()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_written_step_is_followed_by_the_callback(tmp_path: Path, is_async: bool) -> None:
    """Before the caller of an asynchronous save, which writes the tracker file, is called back."""
    seen: list[Any] = []
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(3))}
    options = {"async_sharded_save": is_async, "async_strategy": "mcore"}
    original = dist_checkpointing.save
    with hooks.after_step_is_written(lambda step, _: seen.append(sorted(path.name for path in step.iterdir()))):
        request = dist_checkpointing.save(state, str(tmp_path), **options)
    assert dist_checkpointing.save is original
    if is_async:
        assert not seen
        request.add_finalize_fn(lambda: seen.append("tracker"))
        request.execute_sync()
    assert seen == [[".metadata", "__0_0.distcp", "metadata.json"], *(["tracker"] if is_async else [])]
