"""Results of routers that were found in closed form, on held-out text."""

from pydantic.dataclasses import dataclass

from moelpr.base.records import STRICT


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
    """

    shares: list[float]
    all_original: float
    distance: float | None = None
    losses: tuple[float, float, float] | None = None


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
