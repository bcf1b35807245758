"""The record of routers that were found in closed form, its table, and the layers of a dense base."""

from dataclasses import field
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import nn

from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.report.findings import Findings
from moelpr.measure.report.page import terminal_table


@dataclass(frozen=True, config=STRICT)
class RoutedModel(Record):
    """How the routers of an export were found, and what they keep.

    Attributes:
        model: Name of the folder of the export, or of the base whose FFNs were combined.
        experts: The new experts that were combined, by folder → their languages; empty for an export.
        findings: What the routers do on held-out text.
        onto: The experts that were there before, whose routes stay, by name → their languages.
        ignored: Expert → the loss of its text with what else it changed in the base, and without.
    """

    FILE_NAME: ClassVar[str] = "calibration.json"
    VERSION: ClassVar[int] = 2
    REMEDY: ClassVar[str] = "find the routers again with moelpr model calibrate or combine"

    model: str
    experts: dict[str, list[str]]
    findings: Findings
    ignored: dict[str, tuple[float, float]] = field(default_factory=dict)
    onto: dict[str, list[str]] = field(default_factory=dict)

    def table(self) -> str:
        """Tables for a terminal: a row per end, and a row per text."""
        first, of_texts = map(terminal_table, self.findings.tables([*self.experts]))
        text = f"{first}\n{self.findings.kept_text}\n{of_texts}\n{self.findings.lost}".rstrip()
        for name, (whole, ffns) in self.ignored.items():
            text += f"\n{name}: loss {ffns:.3f} with its FFNs only, {whole:.3f} with what else it changed"
        return text

    def card_text(self) -> str:
        """A section of the model card."""
        its = self.findings
        kept = {name: text.all_original for name, text in its.texts.items() if text.distance is not None}
        in_base = sum(kept.values()) / len(kept)
        return (
            "### Routers\n\n"
            "The routers were found in closed form, without training. "
            f"They keep {its.kept:.1%} of what was learned (loss of held-out text "
            f"{its.base.loss:.3f} → {its.result.loss:.3f} nats per token). "
            f"On held-out text to keep ({', '.join(kept)}), the model is "
            f"{its.result.distance:.3f} nats per token from the base, and {in_base:.1%} of the tokens use only the "
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
