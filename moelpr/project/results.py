"""The last tasks of a project: export, chat model, evaluation against the base, model card and report."""

from pathlib import Path
from typing import Any

from moelpr.data.text.remote import is_remote
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.project.places import PLAN_FILE, Places
from moelpr.project.reading import local_files, versions
from moelpr.project.steps import settings, words
from moelpr.project.workflow.task import Task

_CONTINUATION_TOKENS = 40


def result_tasks(places: Places) -> list[Task]:
    """The tasks after training, in order."""
    found = [] if places.method == "lora" else [export(places)]
    found += [calibrate(places)] if places.project.languages.kept else []
    found += [*([graft(places)] if places.project.chat else []), evaluate(places)]
    found += [routing(places)] if places.method == "moe-lpr" else []
    found += [*([benchmarks(places)] if places.project.benchmarks else []), card(places), report(places)]
    return [*found, *([track(places)] if places.trackers else [])]


def export(places: Places) -> Task:
    """Write the result as a Hugging Face model."""
    fixed: dict[str, Any] = {
        "load": places.folder / places.stages[-1],
        "save": places.exported,
        "chat-template-from": places.project.chat_template,
        "base-model": places.model_name if places.is_downloaded else None,
        "overwrite": True,
    }
    return _writes_model(places, "export", fixed, places.exported, places.stages[-1])


def calibrate(places: Places) -> Task:
    """Keep text of other languages with the original expert."""
    texts = {code: one.text[0] if one.text else places.held_out(code) for code, one in places.languages.items()}
    texts |= places.project.languages.kept
    fixed: dict[str, Any] = {
        "model": places.exported,
        "base": places.base,
        "data": [f"{name}={text}" for name, text in texts.items()],
        "expanded-languages": ",".join(places.expanded),
        "json-key": next(iter(places.languages.values())).json_key,
        "save": places.export,
        "overwrite": True,
    }
    return Task(
        name="calibrate",
        command=words("calibrate", places.own("calibrate"), fixed, repeated=("data",)),
        settings=settings(places.own("calibrate")),
        made_from=("export", *places.base_task),
        files=tuple(path for text in texts.values() for path in local_files([text])),
        versions=versions(*texts.values()),
        is_complete=(places.export / CONFIG_FILE).is_file,
        disk_gib=places.layouts.export_gib,
        memory_gib=1.2 * places.layouts.export_gib + 2,
        gpus_per_node=places.layouts.evaluation_gpus,
    )


def graft(places: Places) -> Task:
    """Add the base's post-training, so that the result can chat."""
    fixed: dict[str, Any] = {
        "base": places.base,
        "instruct": places.project.chat,
        "model": places.export,
        "save": places.chat,
        "overwrite": True,
    }
    return _writes_model(places, "graft", fixed, places.chat, places.last_model_step, *places.base_task)


def _writes_model(places: Places, step: str, fixed: dict[str, Any], save: Path, *made_from: str) -> Task:
    return Task(
        name=step,
        command=words(step, places.own(step), fixed),
        made_from=made_from,
        is_complete=(save / CONFIG_FILE).is_file,
        disk_gib=places.layouts.export_gib,
    )


def evaluate(places: Places) -> Task:
    """Measure bits per byte of base and result on held-out text, and let them continue some."""
    return _measure(places, "evaluate", _models(places), {"continuations": _CONTINUATION_TOKENS}, "results.json")


def routing(places: Places) -> Task:
    """Measure which experts the result chooses for each language."""
    return _measure(places, "routing", _models(places)[1:], {}, "routing.json")


def _measure(places: Places, step: str, models: list[str], more: dict[str, Any], output: str) -> Task:
    data = {code: places.held_out(code) for code in places.languages}
    fixed: dict[str, Any] = {
        "model": models,
        "data": [f"{code}={path}" for code, path in data.items()],
        "original-languages": ",".join(places.original),
        "max-documents": places.project.held_out,
        "output": places.evaluation,
    }
    given = [path for code, path in data.items() if places.languages[code].held_out]
    return Task(
        name=step,
        command=words(step, places.own(step), fixed | more, repeated=("model", "data")),
        settings=settings(places.own(step)),
        made_from=(places.last_model_step, *places.base_task, *places.text_tasks),
        files=tuple(Path(path) for path in given if not is_remote(path)),
        versions=versions(*filter(is_remote, map(str, given))),
        is_complete=(places.evaluation / output).is_file,
        memory_gib=1.2 * places.layouts.export_gib + 2,
        gpus_per_node=places.layouts.evaluation_gpus,
    )


def benchmarks(places: Places) -> Task:
    """Run lm-evaluation-harness on base and result."""
    chosen = places.project.benchmarks
    assert chosen is not None
    fixed: dict[str, Any] = {
        "model": _models(places),
        "languages": ",".join(places.languages),
        "original-languages": ",".join(places.original),
        "tasks": chosen.tasks,
        "limit": chosen.limit,
        "output": places.evaluation,
    }
    return Task(
        name="benchmarks",
        command=words("benchmarks", places.own("benchmarks"), fixed, repeated=("model",)),
        settings=settings(places.own("benchmarks")),
        made_from=(places.last_model_step, *places.base_task),
        files=(Path(chosen.tasks),) if chosen.tasks else (),
        is_complete=(places.evaluation / "harness.json").is_file,
        memory_gib=1.2 * places.layouts.export_gib + 2,
        gpus_per_node=places.layouts.evaluation_gpus,
    )


def card(places: Places) -> Task:
    """Complete the model card with languages and results."""
    measured = {name: step for name, step in _measured(places).items() if step != "routing"}
    fixed: dict[str, Any] = {
        "results": [places.evaluation / f"{name}.json" for name in measured],
        "evaluated": places.method,
        "languages": ",".join(places.languages),
    }
    made_from = (places.last_model_step, *measured.values())
    return Task(name="card", command=words("card", places.own("card"), fixed, str(places.export)), made_from=made_from)


def report(places: Places) -> Task:
    """Write the report of the stages and their evaluation."""
    measured = _measured(places)
    fixed: dict[str, Any] = {
        "evaluation": [places.evaluation / f"{name}.json" for name in measured],
        "output": places.folder,
    }
    runs = [str(places.folder / stage) for stage in places.stages]
    return Task(
        name="report",
        command=words("report", places.own("report"), fixed, *runs),
        made_from=(*places.stages, *measured.values()),
        is_complete=(places.folder / "report.html").is_file,
    )


def track(places: Places) -> Task:
    """Send results, report and plan to the trackers, and what they lack of the stages."""
    fixed: dict[str, Any] = {
        "results": [places.evaluation / f"{name}.json" for name in _measured(places)],
        "files": [places.evaluation, places.folder / "report.html", places.folder / PLAN_FILE, places.file.path],
    }
    runs = [str(places.folder / stage) for stage in places.stages]
    command = [*words("track", places.own("track"), fixed, *runs), *places.trackers]
    return Task(name="track", command=command, made_from=("report",))


def _measured(places: Places) -> dict[str, str]:
    """The results, each with the step that measures it."""
    found = {"results": "evaluate"} | ({"routing": "routing"} if places.method == "moe-lpr" else {})
    return found | ({"harness": "benchmarks"} if places.project.benchmarks else {})


def _models(places: Places) -> list[str]:
    return [f"base={places.base}", f"{places.method}={places.export}"]
