"""Compare finished projects of one base on the same texts: what each has learned, and what it has lost.

    moelpr compare moe-lpr.yaml full.yaml lora.yaml --data fr=fr.jsonl --output runs/comparison

Learned is the mean change of bits per byte over the expanded languages' held-out text, lost that over text to keep: the
held-out text of original languages, and languages.kept, of all projects. --data adds text that no project was shown.
All changes are against the base, paired by document. The table also has KL(base‖model), and the changes against the
first project. Nothing is measured twice in the output folder.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from moelpr.base.errors import UserError
from moelpr.base.settings import POSITIONAL, REPEATED, Count, Folder, metavar
from moelpr.data.text.reading import read_documents
from moelpr.measure.evaluate.settings import DeviceFlags, ReadingFlags, named_paths
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject

_BASE = "base"  # its name among the models


class Settings(ReadingFlags, DeviceFlags):
    files: Annotated[list[Path], POSITIONAL, metavar("languages.yaml")]  # file of a finished project (moelpr run)
    # more text, which no project was shown; repeat for several
    data: Annotated[list[str], REPEATED, metavar("NAME=FILE")] = []
    max_documents: Count | None = None  # documents per text (default: held_out of the first project)
    output: Folder = Path("comparison")  # folder for results and figures; rerun the command to resume


def main(args: Settings) -> None:
    projects = labelled([ResolvedProject(read_project(path)) for path in args.files])
    check(projects)
    documents, groups = read_texts(projects, named_paths(args.data, "--data"), args.json_key, args.max_documents)
    # After the arguments and the text: torch and matplotlib are slow to import.
    from moelpr.measure.evaluate.compare import compare_models
    from moelpr.measure.evaluate.models import read_max_positions
    from moelpr.measure.evaluate.result_cache import ResultCache
    from moelpr.project.comparison import Compared

    first = next(iter(projects.values()))
    models = {_BASE: first.base} | {label: project.export for label, project in projects.items()}
    settings = args.windows().resolve({name: read_max_positions(path) for name, path in models.items()})
    score = partial(
        compare_models,
        documents=documents,
        settings=settings,
        device=args.device,
        dtype=args.dtype,
        verify=args.verify,
        cache=ResultCache(args.output),
    )
    own_tokens = {label for label, project in projects.items() if project.content.vocabulary}
    scores = score({name: path for name, path in models.items() if name not in own_tokens}, base=first.base).scores
    scores |= score({label: models[label] for label in own_tokens}).scores
    results = Compared(projects, groups, settings, scores.pop(_BASE), scores)
    results.write(args.output)
    if args.json:
        print(results.json_text())
    else:
        results.print()


def labelled(projects: Sequence[ResolvedProject]) -> dict[str, ResolvedProject]:
    """Name projects by their methods, the stems of their files or the files' paths: the first that all differ in.

    Raises:
        UserError: A file is given twice.
    """
    for name_of in (lambda one: one.method, lambda one: one.file.path.stem, lambda one: str(one.file.path)):
        names: list[str] = [name_of(project) for project in projects]
        if len({_BASE, *names}) > len(names):
            return dict(zip(names, projects, strict=True))
    raise UserError(f"{', '.join(names)}: one of them is given twice; pass each project once")


def check(projects: Mapping[str, ResolvedProject]) -> None:
    """Check that projects can be compared.

    Raises:
        UserError: One is unfinished, or they differ in base or expanded languages.
    """
    first, *_ = projects.values()
    for project in projects.values():
        path = project.file.path
        if not (project.export / CONFIG_FILE).is_file():
            raise UserError(f"{path} is unfinished: there is no model in {project.export}; run moelpr run {path}")
        if _base(project) != _base(first):
            raise UserError(
                f"the base of {path} is {project.content.model}, that of {first.file.path} is {first.content.model}; "
                "compare projects of one base"
            )
        if {*project.expanded} != {*first.expanded}:
            ours, theirs = (", ".join(sorted(one.expanded)) for one in (project, first))
            raise UserError(
                f"the expanded languages of {path} are {ours}, those of {first.file.path} are {theirs}; compare "
                "projects of the same ones"
            )


def _base(project: ResolvedProject) -> str:
    """The name of a base: a downloaded one is in each project's own folder."""
    return project.content.model if project.is_downloaded else str(project.base.resolve())


def read_texts(
    projects: Mapping[str, ResolvedProject], more: Mapping[str, str], json_key: str, max_documents: int | None
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Read the held-out text of projects, what they keep, and more text by name.

    Returns:
        Name → documents, and group → names of its texts.

    Raises:
        UserError: Two texts of one name differ.
    """
    first = next(iter(projects.values()))
    limit = max_documents or first.content.held_out
    kept = [name for project in projects.values() for name in (*project.original, *project.kept)]
    groups = {"expanded": first.expanded, "kept": [*dict.fromkeys(kept)], "other": [*more]}
    texts: dict[str, tuple[str, list[str]]] = {}

    def add(name: str, path: str, key: str) -> None:
        documents = read_documents(path, key, limit)
        if name in texts and texts[name][1] != documents:
            raise UserError(
                f"the text {name} is not the same in {path} and {texts[name][0]}; compare projects that share it"
            )
        texts[name] = path, documents

    for project in projects.values():
        for code in project.languages:
            add(code, project.held_out(code), str(project.own("evaluate").get("json-key", "text")))
        for name, path in project.kept.items():
            add(name, path, next(iter(project.languages.values())).json_key)
    for name, path in more.items():
        if name in texts:
            raise UserError(f"--data {name} names a text of the projects; give it another name")
        add(name, path, json_key)
    documents = {name: documents for name, (_, documents) in texts.items()}
    return documents, {group: names for group, names in groups.items() if names}
