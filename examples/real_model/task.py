"""What a step of the queue is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Command = list[str | Path]


@dataclass(frozen=True)
class Task:
    """One step of the queue: a command, made when its turn comes, because it may depend on the results of earlier ones.

    Attributes:
        settings: names of the settings that need it.
        blocks: whether the later tasks of its settings are left out if it fails.
        minutes: expected on two cores, with the default base.
        memory_gib, disk_gib: needed while it runs, and what it leaves, with the default base.
        variables: of its environment.
        made_from, files, is_complete, continues: of `Steps.step`.
        after: names of the tasks whose results decide its command.
    """

    name: str
    settings: frozenset[str]
    command: Callable[[], Command]
    minutes: float = 1.0
    memory_gib: float = 4.0
    disk_gib: float = 0.0
    variables: Mapping[str, str] = field(default_factory=dict)
    blocks: bool = True
    made_from: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    is_complete: Callable[[], bool] = lambda: True
    continues: Path | None = None
