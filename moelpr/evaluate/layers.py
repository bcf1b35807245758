"""Which layers need experts: how much languages resemble each other at the input of each layer's FFN.

The measure is LayerMoE's (arXiv 2505.22582), as its code computes it. Two languages are as similar in a layer as the
mean cosine of all pairs of a token of one and a token of the other, at the FFN's input. A layer's similarity is the
mean of two means: over pairs of expanded languages, and over pairs of an expanded and an original language. LayerMoE
gives a layer experts in proportion to 1 / similarity. Stock MoE classes have one number of experts, so here the layers
with the lowest similarity get experts, and the others stay dense.

For unit vectors u_i of the tokens of one language and v_j of another, the mean of u_i . v_j over all i and j is
(mean u) . (mean v), so there is no loop over pairs. As a pair is of two languages, no token is paired with itself.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelpr.errors import UserError
from moelpr.evaluate.models import LoadedModel, read_max_positions
from moelpr.evaluate.scoring import Settings, make_batches, make_tensors, tokenize
from moelpr.report.page import Table, terminal_table

MAX_DOCUMENT_TOKENS = 256  # so that the text is more than one or two long documents


@dataclass(frozen=True)
class LayerSimilarity:
    """Of one layer: mean cosines, from -1 to 1."""

    expanded: float | None  # over pairs of expanded languages; None if there is only one
    original: float | None  # over pairs of an expanded and an original language; None if there is no original one

    @property
    def mean(self) -> float:
        """LayerMoE's s; the mean of those that exist."""
        return fmean(value for value in (self.expanded, self.original) if value is not None)


@dataclass(frozen=True)
class LayerChoice:
    """The similarities of all layers, and the layers that get experts."""

    tokens: dict[str, int]  # language -> tokens that were counted
    original_languages: Collection[str]
    layers: list[LayerSimilarity]
    chosen: list[int]  # from 0, in order

    @property
    def flags(self) -> list[str]:
        """Of hf_to_mcore.py and `python -m moelpr.plan`."""
        return ["--moe-layers", ",".join(map(str, self.chosen))]

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "original_languages": [language for language in self.tokens if language in self.original_languages],
            "layers": [{"layer": n, **asdict(layer), "mean": layer.mean} for n, layer in enumerate(self.layers)],
            "chosen": self.chosen,
            "flags": self.flags,
        }

    def to_text(self) -> str:
        rows = [
            [str(number), *map(_cosine, (layer.expanded, layer.original, layer.mean)), "x" * (number in self.chosen)]
            for number, layer in enumerate(self.layers)
        ]
        head = ["layer", "expanded languages", "expanded and original", "mean", "experts"]
        return "\n".join(
            [
                "Mean cosine of two tokens of two languages, at the input of the layer's FFN. Tokens per language: "
                + ", ".join(f"{language} {number:,}" for language, number in self.tokens.items()),
                "",
                terminal_table(Table(head, rows)),
                "",
                f"The {len(self.chosen)} of {len(self.layers)} layers with the lowest mean, for hf_to_mcore.py:",
                f"  {shlex.join(self.flags)}",
            ]
        )


def choose(
    loaded: LoadedModel,
    texts: Mapping[str, Iterable[str]],
    original_languages: Collection[str],
    num_tokens: int,
    share: float,
) -> LayerChoice:
    """Measure a dense Hugging Face model, and give experts to the fraction `share` of its layers.

    Args:
        texts: language -> documents, of which about `num_tokens` tokens are read.
        original_languages: all others are expanded languages.

    Raises:
        UserError: the tokenizer does not support a text, or all documents of a language are too short.
    """
    directions, tokens = {}, {}
    for language, documents in texts.items():
        directions[language], tokens[language] = mean_directions(loaded, language, documents, num_tokens)
    layers = similarities(directions, original_languages)
    return LayerChoice(tokens, original_languages, layers, least_similar(layers, share))


@torch.inference_mode()
def mean_directions(loaded: LoadedModel, language: str, texts: Iterable[str], num_tokens: int) -> tuple[Tensor, int]:
    """Mean unit vector of the tokens at the input of each FFN, [layers, hidden], and the number of tokens.

    A document's start token, which belongs to no language, and its last token are not counted.
    """
    length = min(MAX_DOCUMENT_TOKENS, read_max_positions(loaded.directory) or MAX_DOCUMENT_TOKENS)
    documents = _first_tokens(loaded, language, texts, num_tokens, length)
    decoder = loaded.model.get_decoder()
    sums_LH = torch.zeros(len(decoder.layers), loaded.model.config.hidden_size, dtype=torch.float64)
    count = 0

    def observe(number: int, ffn: nn.Module) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            sums_LH[number] += F.normalize(inputs[0][is_counted_BS].double(), dim=-1).sum(dim=0).cpu()

        return ffn.register_forward_pre_hook(add)

    hooks = [observe(number, layer.mlp) for number, layer in enumerate(decoder.layers)]
    try:
        for batch in make_batches(loaded, documents, Settings(length, context=0)):
            tokens_BS, _, is_counted_BS = make_tensors(batch, loaded.device)
            decoder(input_ids=tokens_BS, use_cache=False)
            count += int(is_counted_BS.sum())
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise UserError(f"no {language} document has more than one token; pass longer ones")
    return sums_LH / count, count


def similarities(directions: Mapping[str, Tensor], original_languages: Collection[str]) -> list[LayerSimilarity]:
    """Of each layer, from the `mean_directions` of each language."""
    original = [language for language in directions if language in original_languages]
    expanded = [language for language in directions if language not in original_languages]
    num_layers = len(directions[expanded[0]])

    def means(pairs: Iterable[tuple[str, str]]) -> Sequence[float | None]:
        cosines_L = [(directions[a] * directions[b]).sum(dim=-1) for a, b in pairs]
        return torch.stack(cosines_L).mean(dim=0).tolist() if cosines_L else [None] * num_layers

    columns = means(combinations(expanded, 2)), means(product(expanded, original))
    return [LayerSimilarity(*layer) for layer in zip(*columns, strict=True)]


def least_similar(layers: Sequence[LayerSimilarity], share: float) -> list[int]:
    """The layers with the lowest similarity: `share` (a fraction) of all, to the nearest number, but at least one."""
    by_similarity = sorted(range(len(layers)), key=lambda number: layers[number].mean)
    return sorted(by_similarity[: max(1, round(share * len(layers)))])


def _first_tokens(
    loaded: LoadedModel, language: str, texts: Iterable[str], num_tokens: int, length: int
) -> list[list[int]]:
    """The first tokens of each document, at most `length`, until there are `num_tokens`."""
    documents: list[list[int]] = []
    missing = num_tokens
    for text in texts:
        documents.append(tokenize(loaded, language, [text])[0][: min(length, missing)])
        missing -= len(documents[-1])
        if missing == 0:
            break
    return documents


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
