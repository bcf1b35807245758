"""How the expanded languages share stage 1: weights from a temperature or from the user, and epochs with a cap."""

from collections.abc import Mapping

from moelpr.base.errors import UserError
from moelpr.base.quantities import format_count
from moelpr.data.mixing import Share, divide
from moelpr.project.project import Language


def mix(
    languages: Mapping[str, Language],
    tokens: Mapping[str, int],
    total: float,
    temperature: float,
    group: str = "expanded",
) -> dict[str, Share]:
    """Divide a budget over languages.

    With a temperature, a language that would be read more often than its cap gives what is too much to the others.

    Args:
        tokens: What there is of each language.
        total: Tokens of stage 1.
        temperature: Exponent of the sizes, unless the languages have weights.
        group: Key of the languages.

    Raises:
        UserError: A language without text, only some with weights, or a cap that cannot be kept.
    """
    weighted = [code for code, language in languages.items() if language.weight is not None]
    if missing := [code for code in languages if not tokens[code]]:
        raise UserError(f"languages.{group}.{missing[0]}: its text has no tokens; add text, or remove the language")
    if weighted and len(weighted) < len(languages):
        other = next(code for code in languages if code not in weighted)
        raise UserError(
            f"languages.{group}.{other}: it has no weight, but {weighted[0]} has one; give all languages a weight, or "
            "none, so that mix.temperature decides"
        )
    size = {code: language.weight or tokens[code] ** temperature for code, language in languages.items()}
    most = {code: language.max_epochs for code, language in languages.items()}
    try:
        parts = divide(tokens, total, size, most)
    except UserError as error:
        raise UserError(f"{'budget' if group == 'expanded' else 'mix.replay'}: {error}") from None
    if weighted and (capped := sorted(code for code, one in parts.items() if one.is_capped)):
        code = capped[0]
        epochs = total * size[code] / sum(size.values()) / tokens[code]
        raise UserError(
            f"languages.{group}.{code}.weight: its {format_count(tokens[code])} tokens would be read {epochs:.3g} "
            f"times, more than its max_epochs {most[code]:g}; lower its weight, add text, or raise max_epochs"
        )
    return parts
