"""Read a run's metrics.jsonl, even while the run is writing it.

An incomplete last line is ignored. A resumed run repeats the steps after its last checkpoint; a step's last record
counts. Events of unknown kinds are ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pydantic_core
from pydantic import AfterValidator, TypeAdapter, ValidationError

from moelpr.base.errors import UserError
from moelpr.base.records import reason
from moelpr.model.metrics.schema import METRICS

_LARGEST = 1e30
# A number; None if it is missing, NaN, or too large to be computed with.
Number = Annotated[
    int | float | None, AfterValidator(lambda x: x if x is not None and -_LARGEST < x < _LARGEST else None)
]
# A training step: iteration, stage, and the metrics of `moelpr.model.metrics.schema` by their keys.
Step = dict[str, Any]


class HeldOutLoss(TypedDict, total=False):
    """The loss on a language's held-out text."""

    group: Literal["original", "expanded"]  # the language's; "original" if it is missing
    lm_loss: Number  # nats per token
    bits_per_byte: Number  # if the number of bytes is known
    bits_per_token: Number  # otherwise


class ValidationEvent(TypedDict):
    """A validation pass."""

    iteration: int  # the number of steps before it
    event: Literal["validation"]
    stage: NotRequired[str]  # the stage that trains
    languages: dict[str, HeldOutLoss]


class WarningEvent(TypedDict):
    """A warning."""

    iteration: int  # the step that triggered it
    event: Literal["warning"]
    stage: NotRequired[str]  # the stage that trains
    kind: NotRequired[str]  # one of moelpr.train.early_warnings
    message: NotRequired[str]  # a sentence with the remedy


class OtherEvent(TypedDict):
    """An event of another version."""

    iteration: int
    event: str


_BY_AXES: dict[str, Any] = {"": Number, "L": list[Number], "LE": list[list[Number]]}
_Step = TypedDict(  # type: ignore[misc]  # its keys are those of the table
    "_Step", {"iteration": int, "stage": NotRequired[str]} | {m.key: NotRequired[_BY_AXES[m.axes]] for m in METRICS}
)
_EVENTS = {
    None: TypeAdapter[Any](_Step),
    "validation": TypeAdapter[Any](ValidationEvent),
    "warning": TypeAdapter[Any](WarningEvent),
}
_OTHER = TypeAdapter[Any](OtherEvent)


@dataclass
class RunMetrics:
    """The records of a run, sorted by iteration."""

    steps: list[Step] = field(default_factory=list)
    validations: list[ValidationEvent] = field(default_factory=list)
    warnings: list[WarningEvent] = field(default_factory=list)


class LineParser:
    """Parses the lines of one metrics.jsonl, which must agree in the numbers of layers and experts."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # axis -> number

    def parse(self, line: bytes) -> Any:
        """The record in a line: a step, which has no `event`, or an event; ValueError if it does not fit the others."""
        content = pydantic_core.from_json(line)
        event = content.get("event") if isinstance(content, dict) else None
        adapter = _EVENTS.get(event, _OTHER) if isinstance(event, str | None) else _OTHER
        try:
            record = adapter.validate_python(content, strict=True)
        except ValidationError as error:
            raise ValueError(reason(error)) from error
        if event is None:
            self._check_sizes(record)
        return record

    def _check_sizes(self, step: Step) -> None:
        for metric in METRICS:
            for axis in metric.axes if step.get(metric) else "":
                for size in {len(step[metric])} if axis == "L" else set(map(len, step[metric])):
                    if size != self._sizes.setdefault(axis, size):
                        what = {"L": "MoE layers", "E": "experts"}[axis]
                        raise ValueError(f"{metric} has {size} {what}, the values before it {self._sizes[axis]}")


def read_run_metrics(path: Path, layers_at_ends: int | None = None) -> RunMetrics:
    """Read all records in the file.

    Args:
        layers_at_ends: The number of first and of last steps that keep their values per layer. The others keep only the
            means, because a long run of a large model takes hundreds of megabytes otherwise. None: all steps.

    Raises:
        UserError: The file is missing, or a line is not a record.
    """
    steps: dict[int, Step] = {}
    passes: dict[int, ValidationEvent] = {}
    warnings: list[WarningEvent] = []
    with_layers: list[int] = []  # steps after the first ones that still have their values per layer
    for record in read_records(path):
        iteration, event = record["iteration"], record.get("event")
        if event == "warning":
            warnings.append(record)
        elif event == "validation":
            passes[iteration] = record
        elif event is None:
            steps[iteration] = record
            if layers_at_ends is not None and len(steps) > layers_at_ends:
                with_layers.append(iteration)
                if len(with_layers) > layers_at_ends:
                    step = steps[with_layers.pop(0)]
                    step |= {m: mean_of(step[m]) if m.axes == "L" else None for m in METRICS if m.axes and m in step}
    return RunMetrics([steps[step] for step in sorted(steps)], [passes[step] for step in sorted(passes)], warnings)


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file in its order; the same UserErrors as `read_run_metrics`."""
    parser = LineParser()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = parser.parse(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):  # still being written
                        return
                    raise UserError(f"{path}, line {number} is not a metrics record ({error}); remove it") from error
                yield record
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); pass a run that has written metrics") from error


def bits_of(loss: HeldOutLoss) -> tuple[str, float | None]:
    """The unit ("bits per byte" if known, else "bits per token") and the value of a language's loss."""
    is_per_token = loss.get("bits_per_byte") is None and loss.get("bits_per_token") is not None
    return ("bits per token", loss["bits_per_token"]) if is_per_token else ("bits per byte", loss.get("bits_per_byte"))


def mean_of(value: Any) -> float | None:
    """The mean of a list of numbers; a number unchanged; None for anything else."""
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return value if isinstance(value, int | float) else None
