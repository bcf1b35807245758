"""How the expanded languages share stage 1: weights from a temperature or from the user, and epochs with a cap."""

from collections.abc import Mapping
from dataclasses import dataclass

from moelpr.process.errors import UserError
from moelpr.process.quantities import format_count
from moelpr.project.project import Language


@dataclass(frozen=True)
class Share:
    """A language's part of stage 1.

    Attributes:
        tokens: What there is.
        weight: Its fraction of the samples.
        epochs: How often its text is read.
        is_capped: Whether `max_epochs` has lowered its weight.
    """

    tokens: int
    weight: float
    epochs: float
    is_capped: bool = False


def mix(
    languages: Mapping[str, Language], tokens: Mapping[str, int], total: float, temperature: float
) -> dict[str, Share]:
    """Divide a budget over languages.

    With a temperature, a language that would be read more often than its cap gives what is too much to the others.

    Args:
        tokens: What there is of each language.
        total: Tokens of stage 1.
        temperature: Exponent of the sizes, unless the languages have weights.

    Raises:
        UserError: A language without text, only some with weights, or a cap that cannot be kept.
    """
    weighted = [code for code, language in languages.items() if language.weight is not None]
    if missing := [code for code in languages if not tokens[code]]:
        raise UserError(f"languages.expanded.{missing[0]}: its text has no tokens; add text, or remove the language")
    if weighted and len(weighted) < len(languages):
        other = next(code for code in languages if code not in weighted)
        raise UserError(
            f"languages.expanded.{other}: it has no weight, but {weighted[0]} has one; give all languages a weight, or "
            "none, so that mix.temperature decides"
        )
    room = {code: language.max_epochs * tokens[code] for code, language in languages.items()}
    if total > sum(room.values()):
        raise UserError(
            f"budget: {format_count(total)} tokens would read the text more often than max_epochs allows "
            f"({format_count(sum(room.values()))} tokens); lower the budget, add text, or raise max_epochs"
        )
    size = {code: language.weight or tokens[code] ** temperature for code, language in languages.items()}
    capped: set[str] = set()
    while True:
        free = {code: value for code, value in size.items() if code not in capped}
        rest = total - sum(room[code] for code in capped)
        wanted = {code: rest * value / sum(free.values()) for code, value in free.items()} | {
            c: room[c] for c in capped
        }
        over = {code for code in free if wanted[code] > room[code] * (1 + 1e-9)}
        if not over:
            break
        if weighted:
            code = min(over)
            raise UserError(
                f"languages.expanded.{code}.weight: its {format_count(tokens[code])} tokens would be read "
                f"{wanted[code] / tokens[code]:.3g} times, more than its max_epochs {languages[code].max_epochs:g}; "
                "lower its weight, add text, or raise max_epochs"
            )
        capped |= over
    return {
        code: Share(tokens[code], wanted[code] / total, wanted[code] / tokens[code], code in capped)
        for code in languages
    }
