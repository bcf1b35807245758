"""Running lm-evaluation-harness: one model after the other, one task after the other, each result kept as it comes."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.evaluate.harness.tasks import Benchmark
from moelpr.evaluate.models import LoadedModel, is_megatron, load_model
from moelpr.evaluate.parts import Parts, fingerprint_model

# model -> task -> {metric or metric_stderr: number}
Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run."""

    include_path: Path | None = None  # folder with task files of one's own
    limit: int | None = None  # questions per task; None: all
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"


def run_tasks(
    models: Mapping[str, Path], benchmarks: list[Benchmark], settings: HarnessSettings, parts: Parts | None
) -> Scores:
    """Raises UserError before a model is opened where lm_eval is missing, or a task is unknown or lacks its data."""
    shots = {
        task: benchmark.num_fewshot for benchmark in benchmarks for tasks in benchmark.tasks.values() for task in tasks
    }
    if found := [name for name, directory in models.items() if is_megatron(directory)]:
        raise UserError(
            f"{found[0]} is a Megatron checkpoint, which lm-evaluation-harness cannot run; export it with "
            "checkpoint_convert/mcore_to_hf.py and give the Hugging Face directory"
        )
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "lm-evaluation-harness is not installed; install the extra: python -m pip install '.[eval]'"
        ) from error
    of = {
        "lm_eval": version, "limit": settings.limit, "dtype": settings.dtype,
        "include_path": _fingerprint_folder(settings.include_path),
    }  # fmt: skip
    scores: Scores = {}
    wanted: dict[str, dict[str, Any]] = {}  # model -> task -> what its part must be of
    for name, directory in models.items():
        model = {"model": fingerprint_model(directory)}
        wanted[name] = {task: of | model | {"num_fewshot": count} for task, count in shots.items()}
        kept = {task: parts.read(name, f"harness {task}", key) for task, key in wanted[name].items()} if parts else {}
        scores[name] = {task: result for task, result in kept.items() if result is not None}
    missing = [task for task in shots if any(task not in found for found in scores.values())]
    if not missing:
        return scores
    manager = _task_manager(missing, settings.include_path)
    loaded_tasks = {task: _load_task(manager, task) for task in missing}
    for name, directory in models.items():
        todo = [task for task in shots if task not in scores[name]]
        if not todo:
            continue
        loaded = load_model(directory, settings.device, settings.dtype)
        for task in todo:
            print(f"{name}: {task}, {shots[task]} shots", flush=True)
            scores[name][task] = _evaluate(loaded, manager, loaded_tasks[task], task, shots[task], settings)
            if parts:
                parts.write(name, f"harness {task}", wanted[name][task], scores[name][task])
    return scores


def _task_manager(names: list[str], include_path: Path | None) -> Any:
    """The harness's own index of tasks; it knows all of `names`."""
    from lm_eval.tasks import TaskManager

    include = str(include_path) if include_path else None
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)  # reading the harness's 14,000 tasks takes many seconds
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"lm-evaluation-harness {metadata.version('lm_eval')} has no task {', '.join(unknown)}; correct the table "
            "of --tasks, or give the folder of your own tasks with --include-path"
        )
    return manager


def _load_task(manager: Any, name: str) -> list[Any]:
    """A task or group with its data, as the harness's own objects."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # datasets raises errors of its own, and each task may run code of its own
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"the task {name} cannot get its data: {reason}; go online once to fill the cache, or leave it out with a "
            "--tasks file of your own"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def _evaluate(
    loaded: LoadedModel, manager: Any, task: list[Any], name: str, num_fewshot: int, settings: HarnessSettings
) -> dict[str, float]:
    """Numbers among the task's results: "acc", "acc_stderr", …"""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=settings.batch_size),
        tasks=task,
        task_manager=manager,  # or it would index all its tasks again
        num_fewshot=num_fewshot,
        limit=settings.limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    results = found["results"].get(name, {})  # none for a group that does not add its tasks up
    return {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }


def _fingerprint_folder(folder: Path | None) -> str | None:
    """Changes when a file of one's own tasks does."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise UserError(f"--include-path {folder} is no folder; give one with task files")
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()
