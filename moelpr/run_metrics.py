"""Read a run's metrics.jsonl, even while the run is writing it or if an older version wrote it.

An incomplete last line is ignored. A resumed run repeats the steps after its last checkpoint; a step's last record
counts. Events of unknown kinds are ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.errors import UserError

Record = dict[str, Any]


@dataclass
class RunMetrics:
    """The records of a run: one per training step, validation pass and warning, sorted by `iteration`."""

    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)


def read_run_metrics(path: Path, layers_at_ends: int | None = None) -> RunMetrics:
    """All records in the file.

    Args:
        layers_at_ends: number of first and of last steps that keep their values per layer; the others keep only the
            means, because a long run of a large model takes hundreds of megabytes otherwise. None: all steps.

    Raises:
        UserError: the file is missing, or a line is not a record.
    """
    steps: dict[int, Record] = {}
    passes: dict[int, Record] = {}
    warnings: list[Record] = []
    with_layers: list[int] = []  # steps after the first ones that still have their values per layer
    for record in _records(path):
        iteration, event = int(record["iteration"]), record.get("event")
        if event == "warning":
            warnings.append(record)
        elif event == "validation":
            passes[iteration] = record
        elif event is None:
            steps[iteration] = record
            if layers_at_ends is not None and len(steps) > layers_at_ends:
                with_layers.append(iteration)
                if len(with_layers) > layers_at_ends:
                    _keep_means(steps[with_layers.pop(0)])
    return RunMetrics([steps[key] for key in sorted(steps)], [passes[key] for key in sorted(passes)], warnings)


def _records(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    int(record["iteration"])
                except (ValueError, TypeError, KeyError) as error:
                    if not line.endswith(b"\n"):  # still being written
                        return
                    raise UserError(f"{path}, line {number} is not a metrics record; remove the line") from error
                yield record
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); pass a run that has written metrics") from error


def _keep_means(record: Record) -> None:
    for name, value in record.items():
        if isinstance(value, list):
            record[name] = mean_of(value) if not (value and isinstance(value[0], list)) else None


def mean_of(value: Any) -> float | None:
    """The mean of a list of numbers; a number unchanged; None for anything else."""
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return value if isinstance(value, int | float) else None
