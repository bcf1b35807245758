"""The steps after training: export, chat model, evaluation against the base, model card and report."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moelpr.base.languages import is_code
from moelpr.project.resolved import PLAN_FILE, ResolvedProject
from moelpr.project.steps.step import AUTO, LORA, METHODS, MOE_LPR, SECOND_FFN, Step, step, texts_read
from moelpr.project.workflow.task import Task

_CONTINUATION_TOKENS = 40


@step("export", "model export", reserved="load save chat-template-from overwrite", methods=METHODS - LORA)
def export(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Write the result of the trainings as a Hugging Face model."""
    for before in project.parts if project.method in SECOND_FFN else project.stages[-1:]:
        yield _exported(step, project, before, project.trained_by(before))


@step("review", "model export", reserved="load save chat-template-from overwrite", methods=AUTO)
def review(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Write base and second FFN, with the routers that stage 2 has trained, as a Hugging Face model."""
    yield _exported(step, project, "stage2", project.folder / "review-hf")


def _exported(step: Step, project: ResolvedProject, before: str, save: Path) -> Task:
    flags: dict[str, Any] = {
        "load": project.folder / before,
        "save": save,
        "chat-template-from": project.content.chat_template,
        "base-model": project.model_name if project.is_downloaded else None,
        "overwrite": True,
    }
    fields: dict[str, Any] = {
        "model": save,
        "is_result": save in project.models.values(),
        "disk_gib": project.layouts.export_gib,
    }
    name = "-".join([step.name, *before.split("-", 1)[1:]])
    return step.task(project, flags, name=name, made_from=(before,), **fields)


@step(
    "calibrate",
    "model calibrate",
    reserved="model base data expanded-languages exclude save overwrite",
    speed="device",
    methods=MOE_LPR,
)
def calibrate(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Keep text of other languages with the original expert."""
    if not project.content.languages.kept:
        return
    texts = _texts(project)
    flags: dict[str, Any] = {
        "model": project.trained,
        "base": project.base,
        "data": [f"{name}={text}" for name, text in texts.items()],
        "expanded-languages": ",".join(project.expanded),
        "save": project.export,
    }
    yield _with_routers(step, project, flags, texts)


@step(
    "combine",
    "model combine",
    reserved="expert text keep-text exclude save unchecked overwrite",
    speed="device",
    methods=SECOND_FFN,
)
def combine(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Make an MoE of the base and the trained FFNs, with routers that keep all other text with the base."""
    texts = _texts(project)
    named = {name: f"{name}={text}" for name, text in texts.items()}
    flags: dict[str, Any] = {
        "expert": [f"{','.join(codes)}={project.trained_by(part)}" for part, codes in project.parts.items()],
        "text": [text for name, text in named.items() if name in project.expanded],
        "keep-text": [text for name, text in named.items() if name not in project.expanded],
        "base-model": project.model_name if project.is_downloaded else None,
        "save": project.folder / "hf",
        "unchecked": project.method == "auto" or None,
    }
    yield _with_routers(step, project, flags, texts, str(project.base))


def _texts(project: ResolvedProject) -> dict[str, str]:
    """Text by which routers are found: a file of each language, and all that is to be kept."""
    texts = {code: one.text[0] if one.text else project.held_out(code) for code, one in project.languages.items()}
    return texts | project.kept


def _with_routers(
    step: Step, project: ResolvedProject, flags: dict[str, Any], texts: dict[str, str], *positional: str
) -> Task:
    """The task that finds routers by these texts, without documents that are evaluated on, and writes the model."""
    held_out = [project.held_out(code) for code, one in project.languages.items() if one.text and not one.held_out]
    made = "lora" if project.method in LORA else "export"
    made_from = [part.replace(project.main_stage, made, 1) for part in project.parts]
    given = {name: [text] for name, text in texts.items() if not (project.kept_task and name in project.kept)}
    return step.task(
        project,
        flags | {"exclude": held_out, "json-key": next(iter(project.languages.values())).json_key, "overwrite": True},
        *positional,
        repeated=("data", "expert", "text", "keep-text", "exclude"),
        made_from=(*made_from, *project.held_out_tasks, *project.base_task, *project.kept_task),
        **texts_read(project, given),
        model=flags["save"],
        disk_gib=project.layouts.export_gib,
        **_cost(project),
    )


@step("graft", "model graft", reserved="base instruct model save overwrite", methods=MOE_LPR | SECOND_FFN)
def graft(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Add the base's post-training, so that the result can chat."""
    if not project.content.chat:
        return
    save = project.folder / "chat"
    flags: dict[str, Any] = {
        "base": project.base,
        "instruct": project.content.chat,
        "model": project.export,
        "save": save,
        "overwrite": True,
    }
    yield step.task(
        project,
        flags,
        made_from=(*_model_steps(project), *project.base_task),
        files=(Path(project.content.chat),) if Path(project.content.chat).is_dir() else (),
        model=save,
        disk_gib=project.layouts.export_gib,
    )


_MEASURED = "model data original-languages output"


@step("evaluate", "evaluate text", reserved=f"base {_MEASURED}", speed="batch-size device")
def evaluate(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Measure bits per byte of base and result on held-out text, and let them continue some."""
    yield _measure(step, project, _models(project), {"continuations": _CONTINUATION_TOKENS})


@step("routing", "evaluate routing", reserved=_MEASURED, speed="batch-size device", methods=MOE_LPR | SECOND_FFN)
def routing(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Measure which experts the result chooses for each language."""
    yield _measure(step, project, _models(project)[1:], {})


def _measure(step: Step, project: ResolvedProject, models: list[str], more: dict[str, Any]) -> Task:
    data = {code: project.held_out(code) for code in project.languages}
    flags: dict[str, Any] = {
        "model": models,
        "data": [f"{code}={path}" for code, path in data.items()],
        "original-languages": ",".join(project.original),
        "max-documents": project.content.held_out,
        "output": project.evaluation,
    }
    given = {code: [path] for code, path in data.items() if project.languages[code].held_out}
    return step.task(
        project,
        flags | more,
        repeated=("model", "data"),
        made_from=(*_model_steps(project), *project.base_task, *project.held_out_tasks),
        **texts_read(project, given),
        is_complete=_results(project)[step.name].is_file,
        **_cost(project),
    )


@step("benchmarks", "evaluate harness", reserved="model original-languages output", speed="batch-size device")
def benchmarks(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Run lm-evaluation-harness on base and result."""
    if (chosen := project.content.benchmarks) is None:
        return
    flags: dict[str, Any] = {
        "model": _models(project),
        "languages": ",".join(project.languages),
        "original-languages": ",".join(project.original),
        "tasks": chosen.tasks,
        "limit": chosen.limit,
        "output": project.evaluation,
    }
    yield step.task(
        project,
        flags,
        repeated=("model",),
        made_from=(*_model_steps(project), *project.base_task),
        files=(Path(chosen.tasks),) if chosen.tasks else (),
        is_complete=_results(project)[step.name].is_file,
        **_cost(project),
    )


@step("card", "model card", reserved="results evaluated languages")
def card(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Complete the model card with languages and results."""
    results = {name: path for name, path in _results(project).items() if name != "routing"}
    codes = ",".join(filter(is_code, project.languages))

    def has_results(path: Path) -> bool:  # a model that is exported again has a card without
        return path.is_file() and "\nmodel-index:" in path.read_text(encoding="utf-8", errors="replace")

    for model, folder in project.models.items():
        yield step.task(
            project,
            {"results": [*results.values()], "evaluated": model, "languages": codes},
            str(folder),
            name=step.name if folder == project.export else f"{step.name}-{model}",
            made_from=(*_model_steps(project), *results),
            is_complete=partial(has_results, folder / "README.md"),
        )


@step("report", "report", reserved="evaluation routers output")
def report(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Write the report of the stages and their evaluation."""
    results = _results(project)
    routers = project.folder / "hf" / "calibration.json" if project.method in SECOND_FFN or project.kept else None
    flags: dict[str, Any] = {"evaluation": [*results.values()], "routers": routers, "output": project.folder}
    is_complete = (project.folder / "report.html").is_file
    yield step.task(project, flags, *_runs(project), made_from=(*project.stages, *results), is_complete=is_complete)


@step("track", "track", reserved="results files tracker-run")
def track(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Send results, report and plan to the trackers, and what they lack of the stages."""
    if not project.trackers:
        return
    flags: dict[str, Any] = {
        "results": [*_results(project).values()],
        "files": [project.evaluation, project.folder / "report.html", project.folder / PLAN_FILE, project.file.path],
    }
    yield step.task(project, flags | project.trackers, *_runs(project), made_from=("report",))


def _model_steps(project: ResolvedProject) -> list[str]:
    """The steps that write finished models."""
    if project.method in SECOND_FFN:
        return ["combine", "review"] if project.method == "auto" else ["combine"]
    return ["calibrate" if project.content.languages.kept else "lora" if project.method == "lora" else "export"]


def _results(project: ResolvedProject) -> dict[str, Path]:
    """The results of each step that measures some."""
    files = {"evaluate": "results.json"} | ({"routing": "routing.json"} if project.method in routing.methods else {})
    files |= {"benchmarks": "harness.json"} if project.content.benchmarks else {}
    return {step: project.evaluation / name for step, name in files.items()}


def _models(project: ResolvedProject) -> list[str]:
    return [f"base={project.base}", *(f"{name}={folder}" for name, folder in project.models.items())]


def _runs(project: ResolvedProject) -> list[str]:
    is_unused = project.method == "auto" and not project.is_reviewed
    return [str(project.folder / stage) for stage in project.stages if stage != "stage2" or not is_unused]


def _cost(project: ResolvedProject) -> dict[str, Any]:
    """The cost of running the finished model."""
    layouts = project.layouts
    times = 1.2 if layouts.cluster else 2.4  # CPUs compute in fp32
    return {"memory_gib": times * layouts.export_gib + 2, "gpus_per_node": layouts.evaluation_gpus}
