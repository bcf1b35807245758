"""A direction for the router of each MoE layer that tells text to keep from text of the expanded languages.

Training shows routers little text, so they send much of what they have not seen to new experts. Ridge regression on
what the routers read, x [H], finds a direction u [H] for which u · x is near 1 on text to keep and near a target below
0 on expanded text. The router's rows of the original expert's copies become the mean of those of new experts plus δ u,
δ > 0: all choices of a token are original if u · x is large enough, and its output is the base's; where u · x < 0, new
experts gain weight.

Text to keep is read as the base reads it: where all choices are original, the layers below are the base's too. The
token that starts a document belongs to it, because all others attend to it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn
from tqdm import tqdm

from moelpr.base.errors import UserError
from moelpr.base.records import STRICT
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.evaluate.scoring import IGNORED, Settings, make_batches, make_tensors, tokenize
from moelpr.model.metrics.routing_sums import text_vector

# The score that expanded text should have; the lower, the more of it goes to new experts.
TARGETS = (-0.2, -0.4, -0.6, -0.8, -1.2, -1.6)
_SETTINGS = Settings(context=0).resolve({})
_RIDGE = 0.01  # a multiple of the mean of the diagonal
_PIECES, _HELD_OUT = 10, 5  # at least so many pieces of a text; one of five tells how large δ must be
_MARGIN = 1.01  # for the rounding of a model's dtype
_MAX_NOISE = 4.0  # how far expanded tokens may be moved against each other, in multiples of how new experts differ


@pydantic_dataclass(frozen=True, config=STRICT)
class Shares:
    """Where held-out tokens go, as means over layers.

    Attributes:
        all_original: Fraction of tokens whose choices are all original.
        new_gate_weight: Mean gate weight of new experts.
    """

    all_original: float
    new_gate_weight: float


@dataclass(frozen=True)
class Calibration:
    """The rows of routers for one of `TARGETS`, and their effect.

    Attributes:
        rows: Layer number, from 0 → the router's row of each copy of the original expert [H].
        before, after: Text ("kept", "expanded") → where its tokens go.
    """

    rows: dict[int, Tensor]
    before: dict[str, Shares]
    after: dict[str, Shares]


class Inputs:
    """The inputs of the routers of a model: sums for the regression, and held-out rows as they are."""

    def __init__(self) -> None:
        self.gram: dict[int, Tensor] = {}  # layer → Σ w x xᵀ [H, H]
        self.mean: dict[int, Tensor] = {}  # layer → Σ w x [H]
        self.held_out: dict[int, list[Tensor]] = {}  # layer → [tokens, H]
        self.pieces: list[list[int]] = []  # the held-out text

    def add(self, layer: int, rows_TH: Tensor, weight: float) -> None:
        """Add rows that the direction is fitted to."""
        rows_TH = rows_TH.float()
        self.gram[layer] = self.gram.get(layer, 0) + weight * rows_TH.T @ rows_TH
        self.mean[layer] = self.mean.get(layer, 0) + weight * rows_TH.sum(0)

    def hold_out(self, layer: int, rows_TH: Tensor) -> None:
        self.held_out.setdefault(layer, []).append(rows_TH.cpu())


@torch.inference_mode()
def read_inputs(
    loaded: LoadedModel,
    modules: Mapping[int, nn.Module],
    texts: Mapping[str, Sequence[str]],
    max_tokens: int,
    with_start: bool,
) -> Inputs:
    """Run a model on texts, each of which counts the same, and keep the inputs of some modules.

    Args:
        modules: Layer number → a module whose first argument is what the layer's router reads.
        texts: Name → documents, whose first `max_tokens` are used, in pieces that are read by themselves.
        with_start: Whether the token that every piece starts with counts, too.

    Raises:
        UserError: A text is too short, or the tokenizer does not support it.
    """
    found = Inputs()
    with tqdm(total=len(texts), desc=f"reading {loaded.directory.name}", unit=" texts", disable=None) as bar:
        for name, documents in texts.items():
            pieces = [ids for ids in _pieces(tokenize(loaded, name, documents), max_tokens) if len(ids) > 1]
            held_out = pieces[_HELD_OUT - 1 :: _HELD_OUT]
            if not held_out:
                raise UserError(
                    f"the text {name} has {sum(map(len, pieces))} tokens in {len(pieces)} pieces; pass at least "
                    f"{_HELD_OUT} documents, or longer ones"
                )
            fitted = [ids for number, ids in enumerate(pieces, start=1) if number % _HELD_OUT]
            weight = 1 / (len(texts) * sum(len(ids) - 1 + with_start for ids in fitted))
            _run(loaded, modules, fitted, with_start, partial(found.add, weight=weight))
            _run(loaded, modules, held_out, with_start, found.hold_out)
            found.pieces += held_out
            bar.update()
    return found


def calibrations(
    routers: Mapping[int, Tensor], num_original: int, topk: int, kept: Inputs, expanded: Inputs, share: float
) -> list[Calibration]:
    """For each of `TARGETS`, the rows with which all choices of `share` of the held-out text to keep are original.

    Args:
        routers: Layer number → the router's weight [E, H], whose first `num_original` rows are the original expert's.

    Raises:
        UserError: Text to keep cannot be told from expanded text.
    """
    found = [_calibrate(routers, num_original, topk, kept, expanded, share, target) for target in TARGETS]
    if not (usable := [one for one in found if _is_usable(one)]):
        before, after = (time["expanded"].new_gate_weight for time in (found[0].before, found[0].after))
        raise UserError(
            f"to keep {share:.0%} of the tokens of text to keep, new experts would fall from a mean gate weight of "
            f"{before:.0%} to {after:.0%} on expanded text; keep less, or check that no text to keep is in an expanded "
            "language"
        )
    return usable


def _is_usable(found: Calibration) -> bool:
    """Whether both texts go where they should; to the same side go those that nothing tells apart."""
    before, after = ({text: its.new_gate_weight for text, its in time.items()} for time in (found.before, found.after))
    return after["kept"] < before["kept"] and after["expanded"] >= 0.5 * before["expanded"]


def _calibrate(
    routers: Mapping[int, Tensor],
    num_original: int,
    topk: int,
    kept: Inputs,
    expanded: Inputs,
    share: float,
    target: float,
) -> Calibration:
    rows, vectors = {}, []
    for layer, weight_EH in routers.items():
        weight_EH = weight_EH.float().cpu()
        direction_H = _direction(kept, expanded, layer, target).cpu()
        kept_TH, expanded_TH = (torch.cat(inputs.held_out[layer]).float() for inputs in (kept, expanded))
        changed_EH = weight_EH.clone()
        changed_EH[:num_original] = weight_EH[num_original:].mean(0)
        strength = _strength(kept_TH, expanded_TH, changed_EH, direction_H, num_original, share)
        changed_EH[:num_original] += strength * direction_H
        rows[layer] = changed_EH[0]
        vectors.append(
            [
                [_last_two(text_TH @ w.T, topk, num_original) for w in (weight_EH, changed_EH)]
                for text_TH in (kept_TH, expanded_TH)
            ]
        )
    means = torch.tensor(vectors).mean(0).tolist()  # text, before or after, all original and gate weight
    before, after = (
        {name: Shares(*means[text][time]) for text, name in enumerate(("kept", "expanded"))} for time in (0, 1)
    )
    return Calibration(rows, before, after)


def _pieces(documents: list[list[int]], max_tokens: int) -> Iterator[list[int]]:
    length = max(1, max_tokens // _PIECES)
    for ids in documents:
        for start in range(0, len(ids), length):
            if max_tokens <= 0:
                return
            yield ids[start : min(start + length, start + max_tokens)]
            max_tokens -= length


def _run(
    loaded: LoadedModel,
    modules: Mapping[int, nn.Module],
    documents: list[list[int]],
    with_start: bool,
    take: Callable[[int, Tensor], None],
) -> None:
    """Give `take` the layers' inputs for all tokens of the documents."""
    for batch in make_batches(loaded, documents, _SETTINGS):
        tokens, targets, is_counted = make_tensors(batch, loaded.device)
        is_counted = targets != IGNORED if with_start else is_counted
        with ExitStack() as hooks:
            for layer, module in modules.items():
                hook = partial(_take, partial(take, layer), is_counted.flatten())
                hooks.callback(module.register_forward_pre_hook(hook).remove)
            loaded.logits(tokens)


def _take(take: Callable[[Tensor], None], is_counted_T: Tensor, module: nn.Module, inputs: Any) -> None:
    rows_TH = inputs[0].flatten(0, -2)
    take(rows_TH[is_counted_T.to(rows_TH.device)])


def _direction(kept: Inputs, expanded: Inputs, layer: int, target: float) -> Tensor:
    """u [H] = (A + λI)⁻¹ b, with A = Σ w x xᵀ and b = Σ w y x, where y is 1 or the target."""
    gram_HH = kept.gram[layer] + expanded.gram[layer].to(kept.gram[layer].device)
    target_H = kept.mean[layer] + target * expanded.mean[layer].to(gram_HH.device)
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean())
    return torch.linalg.solve(gram_HH, target_H)


def _strength(
    kept_TH: Tensor, expanded_TH: Tensor, weight_EH: Tensor, direction_H: Tensor, num_original: int, share: float
) -> float:
    """The smallest δ with which all choices of `share` of the kept tokens are original, within a limit.

    Among expanded tokens u · x differs too: δ u · x may differ no more than `_MAX_NOISE` times as much as the best new
    expert's logit differs from the mean of them.

    Args:
        weight_EH: The router's weight without δ u.
    """
    needed_T = _missing(kept_TH, weight_EH, num_original)
    score_T = kept_TH @ direction_H
    needed_T = torch.where(needed_T <= 0, 0.0, torch.where(score_T > 0, needed_T / score_T, torch.inf))
    spread = _missing(expanded_TH, weight_EH, num_original).std()
    limit = _MAX_NOISE * spread / (expanded_TH @ direction_H).std()
    return min(limit.item(), _MARGIN * needed_T.quantile(share, interpolation="higher").item())


def _missing(rows_TH: Tensor, weight_EH: Tensor, num_original: int) -> Tensor:
    """The margin [T] by which original logits must rise to exceed those of all new experts."""
    logits_TE = rows_TH @ weight_EH.T
    return logits_TE[:, num_original:].amax(1) - logits_TE[:, :num_original].amin(1)


def _last_two(logits_TE: Tensor, topk: int, num_original: int) -> list[float]:
    """Fraction of tokens whose choices are all original, and mean gate weight of new experts."""
    sums = text_vector(logits_TE, topk, num_original, torch.ones(len(logits_TE)))
    return (sums[-2:] / len(logits_TE)).tolist()
