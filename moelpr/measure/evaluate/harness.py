"""Run lm-evaluation-harness on models: one result per model and task, which is cached as it comes.

A result has what every question scored, so that changes are paired.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError, first_line
from moelpr.measure.evaluate.benchmarks import DOCUMENTS, Benchmark, Scores, harness_version, shots_of
from moelpr.measure.evaluate.models import LoadedModel, choose_device, open_model, resolve_dtype
from moelpr.measure.evaluate.result_cache import Json, ResultCache, fingerprint_files, fingerprint_model

_CACHED = "harness "  # before a task: the name of its result in the cache


def run_tasks(
    models: Mapping[str, Path],
    benchmarks: Mapping[str, Benchmark],
    cache: ResultCache,
    settings: Mapping[str, Any],
    verify: Verify = Verify.FULL,
    num_processes: int = 1,
    only: Sequence[str] | None = None,
) -> Scores:
    """Run every task on every model (name -> Hugging Face directory), one model after another.

    Args:
        num_processes: Processes that share what is missing in the cache, each with a GPU of its own if there are GPUs.
        settings: "include_path" (folder with additional task files, or None), "limit" (questions per task, None for
            all), "batch_size", and "device" and "dtype" of `moelpr.measure.evaluate.models.load_model`.
        only: Tasks to run; None for all.

    Raises:
        UserError: before a model is loaded, if lm_eval is missing, or a task is unknown or has no data.
    """
    version = harness_version()
    dtype = resolve_dtype(settings["dtype"], choose_device(settings["device"]))
    of: Json = {"lm_eval": version, "limit": settings["limit"], "dtype": dtype, "include_path": None}
    if folder := settings["include_path"]:
        of["include_path"] = fingerprint_files(file for file in folder.rglob("*") if file.suffix != ".pyc")
    shots = {task: count for task, count in shots_of(benchmarks).items() if only is None or task in only}
    keys: dict[str, dict[str, Json]] = {}  # model -> what its results are computed from, by name in the cache
    for name, directory in models.items():
        of["model"] = fingerprint_model(directory)
        keys[name] = {_CACHED + task: {**of, "num_fewshot": count} for task, count in shots.items()}
    missing = [
        task
        for task in shots
        if any(cache.read(name, _CACHED + task, by_task[_CACHED + task]) is None for name, by_task in keys.items())
    ]
    if num_processes > 1 and len(missing) > 1:
        run = partial(run_tasks, dict(models), dict(benchmarks), cache, verify=verify)
        _run_shares(run, min(num_processes, len(missing)), missing, cache, settings)
        missing = []
    manager, tasks = load_tasks(missing, settings["include_path"]) if missing else (None, {})
    for name in tasks:
        # The harness would use 0 with a message that is easily missed.
        if shots[name] and any(
            hasattr(task, "get_config") and task.get_config("num_fewshot") == 0  # a group has no settings
            for task in tasks[name]
        ):
            raise UserError(
                f"the task {name} sets num_fewshot to 0, and --tasks wants {shots[name]} shots; state 0 there, or "
                "remove it from the task"
            )

    def measure(name: str, names: list[str]) -> Iterator[tuple[str, Json]]:
        with open_model(models[name], settings["device"], settings["dtype"], verify) as loaded:
            for task in (cached.removeprefix(_CACHED) for cached in names):
                print(f"{name}: {task}, {shots[task]} shots", flush=True)
                yield _CACHED + task, _evaluate(loaded, manager, tasks[task], task, shots[task], settings)

    results = {name: cache.complete(name, keys[name], partial(measure, name)) for name in models}
    return {name: {task: result[_CACHED + task] for task in shots} for name, result in results.items()}


def _run_shares(
    run: Callable[..., Scores], number: int, missing: Sequence[str], cache: ResultCache, settings: Mapping[str, Any]
) -> None:
    """Run the missing tasks in several processes, which put each result into the cache."""
    if cache.folder is None:
        raise UserError("--num-processes requires --output, where the processes leave their results")
    gpus = torch.cuda.device_count()
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = []
        for place in range(number):
            device = f"cuda:{place % gpus}" if gpus and settings["device"] in ("auto", "cuda") else settings["device"]
            runs.append(pool.submit(run, settings={**settings, "device": device}, only=missing[place::number]))
        for submitted in runs:
            submitted.result()


def load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, dict[str, list[Any]]]:
    """The harness's index of tasks, and each of `names` (tasks or groups) with its data, as the harness's objects."""
    from lm_eval.tasks import TaskManager

    include = str(include_path) if include_path else None
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)  # reading the harness's 14,000 tasks takes many seconds
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"lm-evaluation-harness {harness_version()} has no task {', '.join(unknown)}; correct the "
            "--tasks file, or pass the folder of your own tasks as --include-path"
        )
    tasks = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # datasets raises errors of its own, and a task may run code of its own
            raise UserError(
                f"the data of task {name} are unavailable: {first_line(error)}; run once with network access to fill "
                "the cache, or omit the task in a --tasks file of your own"
            ) from error
        tasks[name] = [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]
    return manager, tasks


def _evaluate(
    loaded: LoadedModel, manager: Any, task: list[Any], name: str, num_fewshot: int, settings: Mapping[str, Any]
) -> Json:
    """The numbers among the task's results: "acc", "acc_stderr", ..., and those of its questions."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluation = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=settings["batch_size"]),
        tasks=task,
        task_manager=manager,  # without it, all tasks are indexed again
        num_fewshot=num_fewshot,
        limit=settings["limit"],
        log_samples=True,
        bootstrap_iters=1000,
    )
    results = evaluation["results"].get(name, {})  # empty for a group that does not aggregate its tasks
    numbers: Json = {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }
    questions = [
        row for rows in evaluation.get("samples", {}).values() for row in sorted(rows, key=lambda r: r["doc_id"])
    ]
    by_metric = {metric: [row.get(metric) for row in questions] for metric in numbers if not metric.endswith("_stderr")}
    kept = {metric: values for metric, values in by_metric.items() if all(isinstance(v, int | float) for v in values)}
    return numbers | {DOCUMENTS: {metric: list(map(float, values)) for metric, values in kept.items() if values}}
