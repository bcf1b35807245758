"""Reading a run's metrics.jsonl, also while the run still writes it, and also one of an older version.

A last line that is only half there is left out. A resumed run repeats the steps after its last checkpoint: the later
record of a step counts. What this version does not know is passed over.
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
    """Records in order of `iteration`: of training steps, of validation passes, of warnings."""

    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)


def read_metrics(path: Path) -> list[Record]:
    """One record per training step. Raises UserError for a missing file and for a line that is not a record."""
    return read_run_metrics(path).steps


def read_run_metrics(path: Path, layers_at_ends: int | None = None) -> RunMetrics:
    """Everything in the file; UserError as in `read_metrics`.

    layers_at_ends: keep values per layer of only so many first and last steps; of the others keep each list's mean. A
    long run of a large model is some hundred megabytes else.
    """
    steps: dict[int, Record] = {}
    passes: dict[int, Record] = {}
    warnings: list[Record] = []
    whole: list[int] = []  # steps whose lists are still there, after the first ones
    for record in _records(path):
        iteration, event = int(record["iteration"]), record.get("event")
        if event == "warning":
            warnings.append(record)
        elif event == "validation":
            passes[iteration] = record
        elif event is None:
            steps[iteration] = record
            if layers_at_ends is not None and len(steps) > layers_at_ends:
                whole.append(iteration)
                if len(whole) > layers_at_ends:
                    _keep_means(steps[whole.pop(0)])
    return RunMetrics(
        [steps[iteration] for iteration in sorted(steps)],
        [passes[iteration] for iteration in sorted(passes)],
        warnings,
    )


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
                    raise UserError(f"{path}, line {number} is no record; remove the line") from error
                yield record
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a run that has written metrics") from error


def _keep_means(record: Record) -> None:
    for name, value in record.items():
        if isinstance(value, list):
            record[name] = mean_of(value) if not (value and isinstance(value[0], list)) else None


def mean_of(value: Any) -> float | None:
    """A number as it is; of a number per layer the mean; None for anything else."""
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return value if isinstance(value, int | float) else None
