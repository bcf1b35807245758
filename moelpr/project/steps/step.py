"""A step of a project as one object: its command, the flags that a user may set, and its tasks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moelpr.base import checksums
from moelpr.base.languages import canonical
from moelpr.data.manifest import Manifest
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.project.file import local_files, versions
from moelpr.project.project import Way
from moelpr.project.resolved import MAIN_STAGE, ResolvedProject
from moelpr.project.workflow.task import NOTHING, Task
from moelpr.train.arguments.recipes import recipe_argv

Flags = Mapping[str, Any]
METHODS = frozenset(MAIN_STAGE)
MOE_LPR: frozenset[Way] = frozenset(("moe-lpr",))
AUTO: frozenset[Way] = frozenset(("auto",))
SECOND_FFN: frozenset[Way] = frozenset(("auto", "second-ffn", "low-rank-ffn"))
LORA: frozenset[Way] = frozenset(("lora", "low-rank-ffn"))


# The steps whose output a project is for.
_RESULTS = "lora export calibrate combine review graft evaluate routing benchmarks card report".split()
# The steps of method: auto that do nothing if the second FFN is good enough, in order, after the step that tells.
REVIEW, _JUDGE = ("replay", "twins", "stage2", "review"), "combine"


def has_model(folder: Path) -> bool:
    """Whether a Hugging Face model is there: its settings and card, and all of its weights in their size."""
    there = {path.name: path.stat().st_size for path in folder.glob("*") if path.is_file()}
    sizes = {name: one.num_bytes for name, one in (checksums.read(folder) or {}).items()}
    return bool(sizes) and there.keys() >= {CONFIG_FILE, "README.md"} and sizes.items() <= there.items()


def has_corpora(*prefixes: Path) -> bool:
    """Whether corpora are there, all of their files in their size."""
    read = [(prefix, Manifest.read(prefix)) for prefix in prefixes]
    files = {Path(f"{prefix}.{name}"): file for prefix, one in read if one for name, file in one.files.items()}
    return all(one for _, one in read) and all(
        path.is_file() and path.stat().st_size == file.bytes for path, file in files.items()
    )


def texts_read(project: ResolvedProject, texts: Mapping[str, Sequence[str]], *files: Path) -> dict[str, Any]:
    """The fields of a task that reads text, by language or name of a text to keep, and other files."""
    missing: list[Exception | None] = [one.error for name in texts if (one := project.file.unread.get(canonical(name)))]
    names = [] if missing else [name for some in texts.values() for name in some]
    missing = [*missing, None]
    return {"files": (*files, *local_files(names)), "versions": versions(*names), "missing": missing[0]}


@dataclass(frozen=True)
class Step:
    """A step of `moelpr run`."""

    name: str  # its name, and its key under `steps` in languages.yaml
    tool: str  # the subcommand that it runs; empty if the user has no say in its flags
    # yields its tasks in a project: what they read and write, and what they cost. None if it lacks the step
    make: Callable[["Step", ResolvedProject], Iterable[Task]]
    reserved: frozenset[str] = frozenset()  # flags that only the project sets, without dashes
    # flags that decide how fast it is, not what it writes: nothing is done again when they change
    speed: frozenset[str] = frozenset()
    methods: frozenset[Way] = METHODS  # the methods that have it

    def tasks(self, project: ResolvedProject) -> list[Task]:
        """The tasks of this step in a project."""
        tasks = [*self.make(self, project)] if project.method in self.methods else []
        if project.method != "auto" or self.name not in REVIEW:
            return tasks
        if project.is_reviewed is False:
            return [Task(name=task.name, command=NOTHING, decided_by=(_JUDGE,)) for task in tasks]
        is_spare = project.is_reviewed is None
        return [replace(task, decided_by=(*task.decided_by, _JUDGE), is_spare=is_spare) for task in tasks]

    def task(
        self,
        project: ResolvedProject,
        flags: Flags | Callable[[], Flags],
        *positional: str,
        name: str = "",
        repeated: tuple[str, ...] = (),
        settings: Sequence[str] = (),
        **fields: Any,
    ) -> Task:
        """A task that runs the step's command; `fields` are those of `Task`.

        Args:
            flags: Flags that the project decides, or a function that returns them when the task's turn comes.
            positional: Words before the flags.
            name: Its name, if the step has several tasks.
            repeated: Flags that are given once for each value.
            settings: More words that decide how fast it is.
        """

        def command() -> list[str]:
            return self.words(project, flags() if callable(flags) else flags, *positional, repeated=repeated)

        of_model = {"is_complete": partial(has_model, fields["model"])} if "model" in fields else {}
        return Task(
            name=name or self.name,
            command=command if callable(flags) else command(),
            settings=[*settings, *self.speed_words(project)],
            **{"is_result": self.name in _RESULTS, **of_model, **fields},
        )

    def words(
        self, project: ResolvedProject, flags: Flags, *positional: str, repeated: tuple[str, ...] = ()
    ) -> list[str]:
        """The command with flags of the project, where they have a value, and over them the user's."""
        words = ["moelpr", *self.tool.split(), *positional]
        own = {flag: value for flag, value in project.own(self.name).items() if flag not in self.speed}
        for flag, value in {**flags, **own}.items():
            for one in value if flag in repeated else [value]:
                words += recipe_argv({f"--{flag}": one})
        return words

    def speed_words(self, project: ResolvedProject) -> list[str]:
        """The user's flags that only decide how fast the step is."""
        return recipe_argv({f"--{flag}": value for flag, value in project.own(self.name).items() if flag in self.speed})


def step(
    name: str, tool: str = "", *, reserved: str = "", speed: str = "", methods: frozenset[Way] = METHODS
) -> Callable[[Callable[[Step, ResolvedProject], Iterable[Task]]], Step]:
    """Make a step of the function that yields its tasks; the flags are separated by spaces."""
    return lambda make: Step(name, tool, make, frozenset(reserved.split()), frozenset(speed.split()), methods)
