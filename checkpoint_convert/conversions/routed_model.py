"""The record of routers that were found in closed form, its table, and the layers of a dense base."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import ClassVar, Self

from pydantic.dataclasses import dataclass
from torch import nn

from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record
from moelpr.base.text_tables import table_text
from moelpr.measure.evaluate.calibration import Calibration, Point, TextResult, kept_of_learning
from moelpr.measure.evaluate.models import LoadedModel


@dataclass(frozen=True, config=STRICT)
class RoutedModel(Record):
    """How the routers of an export were found, and what they keep.

    Attributes:
        model: Name of the folder of the export, or of the base whose FFNs were combined.
        experts: The new experts that were combined, by folder → their languages; empty for an export.
        base: The base itself, on held-out text.
        learned: What was learned, without these routers.
        result: With these routers.
        kept: Share of what was learned that is left.
        tried: The best point of each round.
        shares: Of each third of the layers, the share of the tokens of text to keep that stays.
        texts: Each held-out text with these routers.
        max_distance: The most distance that was allowed; null if it was not given.
        keep: The least share of what was learned that was asked for; null if it was not given.
        ignored: Expert → the loss of its text with what else it changed in the base, and without.
    """

    FILE_NAME: ClassVar[str] = "calibration.json"
    VERSION: ClassVar[int] = 2
    REMEDY: ClassVar[str] = "find the routers again with moelpr model calibrate or combine"

    model: str
    experts: dict[str, list[str]]
    base: Point
    learned: Point
    result: Point
    kept: float
    tried: list[Point]
    shares: list[float]
    texts: dict[str, TextResult]
    max_distance: float | None = None
    keep: float | None = None
    ignored: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        its: Calibration,
        model: Path,
        experts: Mapping[str, list[str]],
        max_distance: float | None,
        keep: float | None,
        ignored: Mapping[str, tuple[float, float]],
    ) -> Self:
        return cls(
            model.resolve().name,
            dict(experts),
            its.base,
            its.learned,
            its.result,
            kept_of_learning(its.base, its.learned, its.result),
            its.tried,
            its.shares,
            its.texts,
            max_distance,
            keep,
            dict(ignored),
        )

    def table(self) -> str:
        """Tables for a terminal: a row per end, and a row per text."""
        points = {"base": self.base, "learned, no routing": self.learned, "result": self.result}
        rows = [[name, f"{its.distance:.3f}", f"{its.loss:.3f}"] for name, its in points.items()]
        head = ["nats per held-out token", "text to keep, KL(base‖model)", "expanded text, loss"]
        text = f"{table_text(head, rows, [0])}\nkept {self.kept:.1%} of what was learned\n"
        names = [*self.experts] or ["new experts"]
        of_text = [
            [
                name,
                f"{its.shares[0]:.1%}",
                *(f"{share:.1%}" for share in (its.shares[1:] if self.experts else [sum(its.shares[1:])])),
                f"{its.all_original:.1%}",
                "" if its.distance is None else f"{its.distance:.3f}",
                *(f"{loss:.3f}" for loss in its.losses or ()),
                *([] if its.losses else [""] * 3),
            ]
            for name, its in self.texts.items()
        ]
        head = ["held-out text", "to the base", *names, "base in all layers", "KL", "loss: base", "learned", "result"]
        text += table_text(head, of_text, [0])
        for name, (whole, ffns) in self.ignored.items():
            text += f"\n{name}: loss {ffns:.3f} with its FFNs only, {whole:.3f} with what else it changed"
        return text

    def card_text(self) -> str:
        """A section of the model card."""
        kept = [(name, its) for name, its in self.texts.items() if its.distance is not None]
        in_base = sum(its.all_original for _, its in kept) / len(kept)
        return (
            "### Routers\n\n"
            "The routers were found in closed form, without training. "
            f"They keep {self.kept:.1%} of what was learned (loss of held-out text "
            f"{self.base.loss:.3f} → {self.result.loss:.3f} nats per token). "
            f"On held-out text to keep ({', '.join(name for name, _ in kept)}), the model is "
            f"{self.result.distance:.3f} nats per token from the base, and {in_base:.1%} of the tokens use only the "
            "base's FFNs.\n\n"
        )


def ffns_of(base: LoadedModel, what: str, num_layers: int, hidden: int) -> dict[int, nn.Module]:
    """The FFNs of the base's layers, which read what the routers of an upcycled model read.

    Raises:
        UserError: It is not dense, or of another size; `what` names it.
    """
    layers = list(getattr(base.model.get_decoder(), "layers", []))
    if base.routers or len(layers) != num_layers or base.model.config.get_text_config().hidden_size != hidden:
        raise UserError(
            f"{what} {base.directory} is not the dense base: it must have {num_layers} layers without experts and a "
            f"hidden size of {hidden}"
        )
    return {number: getattr(layer, "mlp", None) or layer.shared_mlp for number, layer in enumerate(layers)}
