"""A command that writes the job scripts of a project: a task of each language, and a training."""

import argparse
from pathlib import Path

from moelpr.base.command import run_command


def main() -> None:
    from moelpr.project.file import parse_project, text_of
    from moelpr.project.workflow.slurm import Chain
    from moelpr.project.workflow.task import Task
    from moelpr.project.workflow.workflow import Workflow

    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    project = parse_project(text_of(path), path).project
    folder = Path(project.output)
    names = [code for code, _ in project.languages]
    tasks = [Task(name=f"preprocess-{name}", command=["moelpr", "data", "preprocess", name]) for name in names]
    train = ["moelpr", "train", "stage1", "--save", str(folder / "stage1")]
    tasks += [Task(name="stage1", command=train, continues=folder / "stage1", made_from=(tasks[0].name,), nodes=2)]
    Chain(Workflow(folder, tasks), project.slurm, path).submit(render_only=True)


if __name__ == "__main__":
    run_command(main)
