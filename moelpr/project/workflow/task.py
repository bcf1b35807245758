"""A task: a command of a workflow, with what it reads, what it writes and what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Words = Sequence[str | Path]
NOTHING: Words = ("-c", "pass")  # the command of a task that earlier results have made needless


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command of a workflow. Tables of tasks are data: nothing runs before `Workflow.run`."""

    name: str  # the name of the task, its mark and its log
    # a subcommand (`moelpr model convert …`), a launcher (`launch/stage1.sh …`), or arguments of Python (`tool.py …`,
    # `-m module …`). A function returns it when the task's turn comes, if earlier tasks decide it; it may raise a
    # UserError
    command: Words | Callable[[], Words]
    # further words of the command that decide how fast it is, not what it writes, such as a layout. It is not done
    # again when they change
    settings: Words = ()
    made_from: tuple[str, ...] = ()  # names of the tasks whose output it reads. It is done again when one of them was
    decided_by: tuple[str, ...] = ()  # names of the tasks whose results only decide its command
    # other files and folders that it reads. It is done again when their content has changed
    files: tuple[Path, ...] = ()
    # remote files that it reads, each with what identifies its content, likewise
    versions: Mapping[str, str] = field(default_factory=dict)
    # the error of reading files that are gone. A task that is done stays done; of another one, the error is raised
    missing: Exception | None = None
    # whether its output is there; without it, a removed output goes unnoticed. A UserError counts as no
    is_complete: Callable[[], bool] = lambda: True
    model: Path | None = None  # folder of a model that it writes, of which no file may be lost
    # whether a project is for its output, which is made again when it is removed; that of others only when a task reads
    # it
    is_result: bool = False
    # folder that a training continues instead of replacing, even if another command wrote it. If the task changes while
    # it exists, that is an error instead of a reason to run it again
    continues: Path | None = None
    unfinished: tuple[Path, ...] = ()  # folders in which the command keeps work that only the same command can finish
    # folder of outputs that several workflows share. Its mark and log are there; one workflow makes it while others
    # wait, and none makes it with another command than the first
    shared: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # environment variables of the command
    minutes: float | None = None  # expected time; None if unknown
    memory_gib: float = 4.0  # memory that it needs while it runs, on each node
    disk_gib: float = 0.0  # disk space that its output needs
    nodes: int = 1  # number of nodes, on each of which the command is started
    gpus_per_node: int = 0  # number of GPUs that it uses on each node
    cpus: int = 1  # number of CPUs that it can use
    is_spare: bool = False  # whether results that are not there yet decide if there is anything to do
    # prefixes of corpora that it writes; jobs of a cluster can write them in shards (`--num-shards`)
    corpora: tuple[Path, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do."""
        return self.command != NOTHING

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tasks that must be done before."""
        return (*self.made_from, *self.decided_by)

    def words(self) -> list[str]:
        """The words of the command.

        Raises:
            UserError: The results that decide it are missing.
        """
        return [str(word) for word in (self.command() if callable(self.command) else self.command)]

    def written(self) -> list[str]:
        """The names of all files of its model."""
        names = (path.relative_to(self.model) for path in self.model.rglob("*") if path.is_file()) if self.model else ()
        return sorted(str(name) for name in names if not name.name.startswith("."))
