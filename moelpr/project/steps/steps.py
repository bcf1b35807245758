"""All steps of a project, and its tasks: from text to an evaluated Hugging Face model."""

from argparse import ArgumentParser
from pathlib import Path

from moelpr.base import settings
from moelpr.base.errors import UserError, did_you_mean
from moelpr.base.tools import COMMANDS, DEFAULTS
from moelpr.project.file import ProjectFile
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps import results, text, training
from moelpr.project.steps.step import REVIEW, Step
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from moelpr.train.arguments.early import wrong_value
from moelpr.train.arguments.flags import supported_arguments
from moelpr.train.arguments.recipes import read_recipe
from moelpr.train.launcher import OPTIONS

# In the order in which they run.
_STEPS = [text.download, text.kept, text.vocabulary, text.preprocess, text.replay, text.conversations, training.convert]
_STEPS += [*training.STAGES, training.lora, results.export, results.calibrate, results.combine]
_STEPS += [training.twins, results.review, results.graft, results.evaluate, results.routing, results.benchmarks]
_STEPS += [results.card, results.report, results.track]
STEPS: dict[str, Step] = {step.name: step for step in _STEPS}


def tasks_of(project: ResolvedProject) -> list[Task]:
    """All tasks, in an order in which they can run."""
    names = [*STEPS]
    if project.method == "auto":
        names = [name for name in names if name not in REVIEW]
        place = names.index("combine") + 1
        names[place:place] = REVIEW
    return [task for name in names for task in STEPS[name].tasks(project)]


def workflow_of(project: ResolvedProject, redo: str | None = None) -> Workflow:
    """The tasks in the project's folder; none starts after the file was edited.

    Args:
        redo: Stage to train again if it has changed, with those after it.
    """
    after = project.stages[project.stages.index(redo) :] if redo else []
    again = [stage for stage in after if stage == redo or stage not in project.parts]
    return Workflow(project.folder, tasks_of(project), redo=again, check=project.file.check_unchanged)


def check_flags(file: ProjectFile, name: str) -> None:
    """Check the flags of a step, and those of its recipe.

    Raises:
        UserError: Its command does not have one, or not with this value, or it is not the user's to set.
    """
    step, flags = STEPS[name], file.project.steps[name]
    recipe = read_recipe(Path(str(flags["recipe"]))) if flags.get("recipe") else {}
    given = {flag[2:]: value for flag, value in recipe.items()} | flags
    parser, allowed = parser_of(step), given.get("allow-untested", "")
    known = settings.flags_of(parser) | {*map(str, allowed if isinstance(allowed, list) else [allowed])}
    for flag, value in given.items():
        key = f"steps.{name}.{flag if flag in flags else f'recipe: {flag}'}"
        place, see = f"{file.at(*key.split(': ')[0].split('.'))}{key}", f"see moelpr {step.tool} --help"
        if flag in step.reserved & flags.keys():
            raise UserError(f"{place} is set by moelpr run; remove it")
        if flag not in known:
            raise UserError(f"{place} is no flag of this step; {did_you_mean(flag, known, see)}")
        if problem := wrong_value(parser, flag, value):
            raise UserError(f"{place}: {problem}; correct it, {see}")


def parser_of(step: Step) -> ArgumentParser:
    """The parser of a step's command: of Megatron's flags, it has those that the trainer supports."""
    if step in training.STAGES:
        return supported_arguments(*OPTIONS)
    return settings.parser_of(settings.settings_of(COMMANDS[DEFAULTS.get(step.tool, step.tool)].load()))
