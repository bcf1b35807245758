"""Results of routers that were found in closed form, on held-out text."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Self

from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.records import FOREIGN, STRICT
from moelpr.measure.report.numbers import percent
from moelpr.measure.report.page import Table

# A second FFN further from the base than so many nats, or with less of what was learned, is reviewed by method: auto.
MOST_DISTANCE, LEAST_KEPT = 0.1, 0.85
MOST_LOST = 0.03  # from this change of a text's loss on, it counts as lost


@dataclass(frozen=True, config=STRICT)
class Point:
    """The distance that routers keep, and the loss that they learn.

    Attributes:
        distance: KL(base‖model) on held-out text to keep, in nats per token, as mean over texts.
        loss: Loss of held-out expanded text in nats per token, as mean over languages.
    """

    distance: float
    loss: float


@dataclass(frozen=True, config=STRICT)
class TextResult:
    """A held-out text with the routers that were found.

    Attributes:
        shares: Fraction of the tokens of all layers whose first choice is the base's FFN, then each new expert.
        all_original: Fraction of the tokens whose choices are the base's FFN in all layers.
        distance: KL(base‖model) in nats per token; null for expanded text.
        losses: Loss by the base, by what was learned, and with these routers, in nats per token; null for text to keep.
        change: Change of the loss against the base's, as a fraction; null in older files.
    """

    shares: list[float]
    all_original: float
    distance: float | None = None
    losses: tuple[float, float, float] | None = None
    change: float | None = None


def lacks_of(base: Point, kept: float, result: Point) -> str:
    """The lacks of a second FFN: it is far from the base, keeps too little, or is no better; empty if nothing."""
    distance = result.distance
    goals = {
        f"is {distance:.3f} nats per token from the base (at most {MOST_DISTANCE})": distance <= MOST_DISTANCE,
        f"keeps {kept:.0%} of what was learned (at least {LEAST_KEPT:.0%})": kept >= LEAST_KEPT,
        "is no better than the base": distance + result.loss < base.loss,
    }
    return " and ".join(lack for lack, is_met in goals.items() if not is_met)


@dataclass(frozen=True, config=STRICT)
class Findings:
    """The routers of a model on held-out text.

    Attributes:
        base: The base itself.
        learned: What was learned, without these routers.
        result: With these routers.
        kept: Share of what was learned that is left.
        tried: The best point of each round.
        shares: Of each third of the layers, the share of the tokens of text to keep that stays.
        texts: Each held-out text with these routers.
        max_distance: The most distance that was allowed; null if it was not given.
        keep: The least share of what was learned that was asked for; null if it was not given.
    """

    base: Point
    learned: Point
    result: Point
    kept: float
    tried: list[Point]
    shares: list[float]
    texts: dict[str, TextResult]
    max_distance: float | None
    keep: float | None

    @property
    def kept_text(self) -> str:
        return f"kept {self.kept:.1%} of what was learned"

    @property
    def shortcomings(self) -> str:
        return lacks_of(self.base, self.kept, self.result)

    @property
    def lost(self) -> str:
        """The texts to keep that are clearly worse than by the base, as a sentence; empty if there are none."""
        changes = {name: its.change or 0.0 for name, its in self.texts.items() if its.distance is not None}
        lost = [f"{name} (+{change:.1%})" for name, change in changes.items() if change > MOST_LOST]
        return f"Worse than by the base, though kept: {', '.join(lost)}; add more such text." if lost else ""

    def tables(self, experts: Sequence[str]) -> list[Table]:
        """A row per end, and a row per text; without `experts`, new experts are one column."""
        points = {"base": self.base, "learned, no routing": self.learned, "result": self.result}
        rows = [[name, f"{point.distance:.3f}", f"{point.loss:.3f}"] for name, point in points.items()]
        head = ["nats per held-out token", "text to keep, KL(base‖model)", "expanded text, loss"]
        of_text = [
            [
                name,
                f"{its.shares[0]:.1%}",
                *(f"{share:.1%}" for share in (its.shares[1:] if experts else [sum(its.shares[1:])])),
                f"{its.all_original:.1%}",
                "" if its.distance is None else f"{its.distance:.3f}",
                "" if its.change is None else percent(its.change),
                *(f"{loss:.3f}" for loss in its.losses or ()),
                *([] if its.losses else [""] * 3),
            ]
            for name, its in self.texts.items()
        ]
        new = experts or ["new experts"]
        top = ["held-out text", "to the base", *new, "in all layers", "KL", "change", "loss: base", "learned", "result"]
        return [Table(head, rows), Table(top, of_text)]


@dataclass(frozen=True, config=FOREIGN)
class Calibration:
    """A calibration.json as reports and projects read it.

    Attributes:
        findings: What the routers do.
        experts: The new experts that were combined → their languages; empty if they were trained together.
    """

    findings: Findings
    experts: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        return records.read(cls, path, "find the routers again with moelpr model calibrate or combine")
