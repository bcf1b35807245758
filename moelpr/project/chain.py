"""A project as a chain of tasks, from text to an evaluated Hugging Face model."""

from moelpr.project.places import Places
from moelpr.project.reading import ProjectFile
from moelpr.project.results import result_tasks
from moelpr.project.text import text_tasks
from moelpr.project.training import training_tasks
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow


def tasks_of(places: Places) -> list[Task]:
    """All tasks, in an order in which they can run."""
    return [*text_tasks(places), *training_tasks(places), *result_tasks(places)]


def workflow_of(file: ProjectFile, redo: str | None = None) -> Workflow:
    """The tasks in the project's folder; none starts after the file was edited.

    Args:
        redo: Stage to train again if it has changed, with those after it.
    """
    places = Places(file)
    again = places.stages[places.stages.index(redo) :] if redo in places.stages else []
    return Workflow(places.folder, tasks_of(places), redo=again, check=file.check_unchanged)
