"""How texts share a number of tokens: in proportion to sizes, with a cap on how often each is read."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from moelpr.base.errors import UserError
from moelpr.base.quantities import format_count
from moelpr.base.text_tables import table_text
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.manifest import Manifest


class Mix(NamedTuple):
    """The value of --mix."""

    temperature: float  # exponent of the sizes
    max_epochs: float = 4.0  # how often a text is read at most

    @classmethod
    def argument(cls, text: str) -> "Mix":
        """Parse "temperature=T,max-epochs=E" as the type of a flag."""
        pairs = dict(part.partition("=")[::2] for part in text.split(","))
        try:
            mix = cls(**{name.strip().replace("-", "_"): float(value) for name, value in pairs.items()})
        except (TypeError, ValueError):
            mix = cls(-1)
        if not 0 <= mix.temperature <= 1 or not 0 < mix.max_epochs < float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected temperature=T, from 0 (equal shares) to 1 (by size), and perhaps max-epochs=E above 0, such "
                f"as temperature=0.3,max-epochs=4, got {text[:60]!r}"
            )
        return mix


@dataclass(frozen=True)
class Share:
    """A text's part of what is read."""

    tokens: int  # tokens that there are
    weight: float  # its fraction of the samples
    epochs: float  # how often it is read
    is_capped: bool = False  # whether its cap has lowered its weight


def divide(
    tokens: Mapping[str, int], total: float, sizes: Mapping[str, float], most: Mapping[str, float]
) -> dict[str, Share]:
    """Divide `total` tokens in proportion to `sizes`; what would be read more often than `most` gives the rest.

    Raises:
        UserError: All that may be read is less than `total`.
    """
    room = {name: most[name] * tokens[name] for name in tokens}
    if total > sum(room.values()) * (1 + 1e-9):
        raise UserError(
            f"{format_count(total)} tokens would read the text more often than max_epochs allows "
            f"({format_count(sum(room.values()))} tokens); lower the budget, add text, or raise max_epochs"
        )
    wanted: dict[str, float] = {}
    capped: set[str] = set()
    while len(wanted) < len(tokens) or any(wanted[name] > room[name] * (1 + 1e-9) for name in tokens):
        capped |= {name for name in wanted if wanted[name] > room[name] * (1 + 1e-9)}
        rest = total - sum(room[name] for name in capped)
        free = sum(sizes[name] for name in tokens if name not in capped)
        wanted = {name: room[name] if name in capped else rest * sizes[name] / free for name in tokens}
    return {
        name: Share(tokens[name], wanted[name] / total, wanted[name] / tokens[name], name in capped) for name in tokens
    }


def blend(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """The prefixes of --data-path and the weights before them, if any, as Megatron reads them.

    Raises:
        UserError: Only some have a weight.
    """
    weights = []
    for word in words[::2]:
        with suppress(ValueError):
            weights.append(float(word))
    if len(words) % 2 or not weights:
        return [*words], None
    if len(weights) < len(words) / 2:
        raise UserError(f"--data-path {' '.join(words)} has a weight for some corpora only; pass one before each")
    return [*words[1::2]], weights


def num_tokens(prefix: str) -> int:
    """The number of tokens of a corpus."""
    manifest = Manifest.read(prefix)
    return CorpusIndex.open(prefix).num_tokens if manifest is None else manifest.tokens


def mixed(tokens: Mapping[str, int], total: float, asked: Mix) -> dict[str, Share]:
    """Divide tokens as --mix asks for.

    Raises:
        UserError: A text is empty, or all that may be read is less than `total`.
    """
    if empty := [name for name, number in tokens.items() if not number]:
        raise UserError(f"{empty[0]} has no tokens to train on; omit it")
    sizes = {name: number**asked.temperature for name, number in tokens.items()}
    return divide(tokens, total, sizes, dict.fromkeys(tokens, asked.max_epochs))


def share_table(parts: Collection[tuple[str, Share]], head: str) -> str:
    """A row per text, with what limits it."""
    rows = [
        [name, format_count(one.tokens), f"{one.weight:.1%}", f"{one.epochs:.2f}", "max_epochs" * one.is_capped]
        for name, one in parts
    ]
    table = table_text([head, "tokens", "share", "epochs", "limited by"], rows, text_columns=(0, 4))
    capped = ", ".join(name for name, one in parts if one.is_capped)
    note = f"\nmax_epochs lowers the share of {capped}; the others are read more often instead."
    return table + note * bool(capped)
