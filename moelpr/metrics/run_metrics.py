"""Read a run's metrics.jsonl, even while the run is writing it or if an older version wrote it.

An incomplete last line is ignored. A resumed run repeats the steps after its last checkpoint; a step's last record
counts. Events of unknown kinds are ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.process.errors import UserError

Record = dict[str, Any]
# What readers use of a training step: a number each, or one per layer.
_NUMBERS = frozenset(
    "lm_loss lm_loss_original lm_loss_expanded balance_loss lpr_loss grad_norm learning_rate step_time_s tokens_per_s "
    "peak_memory_gib consumed_tokens".split()
)
_PER_LAYER = frozenset(
    f"{share}_{group}" for share in ("original_first_share", "all_original_share") for group in ("original", "expanded")
)
_LARGEST = 1e30


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
                    record = parse_record(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):  # still being written
                        return
                    raise UserError(f"{path}, line {number} is not a metrics record ({error}); remove it") from error
                yield record
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); pass a run that has written metrics") from error


def parse_record(line: bytes) -> Record:
    """The record in a line; NaN and infinity become None.

    Raises:
        ValueError: it is not a record, or what readers use of it has the wrong type.
    """
    try:
        record = json.loads(line, parse_constant=lambda _: None, parse_int=_number, parse_float=_number)
        if b"\\ud" in line.lower():  # half a surrogate pair can't be written
            json.dumps(record, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not an object")
    if type(record.get("iteration")) is not int:
        raise ValueError("no iteration")
    event = record.get("event")
    used = {name: record[name] for name in _NUMBERS & record.keys()} if event is None else {}
    for name in _PER_LAYER & record.keys() if event is None else ():
        shares = record[name]
        used |= {
            f"{name}.{layer}": share for layer, share in enumerate(shares if isinstance(shares, list) else [shares])
        }
    if event == "validation":
        if not isinstance(languages := record.get("languages"), dict):
            raise ValueError("no languages")
        for language, result in languages.items():
            if not isinstance(result, dict) or result.get("group", "original") not in ("original", "expanded"):
                raise ValueError(f"no result of {language}")
            used |= {f"{language}.{unit}": result.get(unit) for unit in ("bits_per_byte", "bits_per_token")}
    for name, value in used.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name} is not a number")
    return record


def _number(digits: str) -> int | float | None:
    """A number; None if it is too large to be computed with."""
    value = float(digits)
    return (int(digits) if digits.lstrip("-").isdigit() else value) if abs(value) < _LARGEST else None


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
