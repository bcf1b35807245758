"""Routers in closed form: which tokens stay with the base's FFN, and which go to what was learned.

Ridge regression on what a layer's router reads, x [H], gives directions: u_k · x is near 1 on text to keep and 0 on
expanded text, u_j · x is near 1 on the text of expert j and 0 elsewhere. With r, the mean of the rows of new experts,
the row of the original FFN in all its places is

    r + δ (u_k + t Σ_j u_j),

so all choices of a token are original if u_k + t Σ u_j is large enough: t is the layer's threshold, the lowest at which
a share of held-out text to keep stays. Layers differ in what they tell apart and in what a mistake costs, so each third
of them has the share that costs least: the distance from the base on held-out text to keep, KL(base‖model), plus the
loss of expanded text, or one of them for a given other. New experts keep their rows, against which δ is large; those
that have none (a token has one choice, whose gate weight is 1) get u_j less the mean of all u_j. Where others chose
before, their rows stay, with mean r and the largest logit above r · x; then the row of a new expert is
r + δ (u_j - mean u - u_k - t Σ u), which is below that logit for all tokens that stay.

Text to keep is first read as the base reads it, and expanded text as its expert does; then as the routed model reads
both, because what was routed below changes what a router reads. The token that starts a document belongs to text to
keep, because all others attend to it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.divergence import distance, mean_loss, remembering
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.evaluate.scoring import IGNORED, Settings, make_batches, make_tensors, tokenize
from moelpr.measure.report.findings import Findings, Point, TextResult, lacks_of

# Shares of the tokens of text to keep; each part of the layers has one.
SHARES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
ROUNDS = 3
_PARTS, _START = 3, 2  # parts of the layers, and the share in `SHARES` that the search starts from
_THRESHOLDS = torch.linspace(1, -3, 161)
_STEEP = 4.0  # deviation of δ (u_k + t Σ u_j) · x, in deviations of the best new expert's logit from the mean of them
_SETTINGS = Settings(context=0).resolve({})
_RIDGE = 0.01  # a multiple of the mean of the diagonal
_PIECES, _HELD_OUT = 10, 5  # at least so many pieces of a text; one of five is held out
_MEASURED, _LAST_MEASURED = 2048, 4096  # held-out tokens of text to keep that searches measure
_MOST_ALIKE = 0.2  # share of the texts to keep that are left out because they cannot be told from expanded text

type Rows = dict[int, Tensor]  # layer number, from 0 → the router's weight [E, H]
type Sums = tuple[Tensor, Tensor]  # a layer's Σ w x xᵀ [H, H] and Σ w x [H], with Σ w = 1
type Pieces = dict[str, list[list[int]]]  # the held-out part of each text
type Parts = tuple[int, ...]  # for each part of the layers, an index of `SHARES`


@dataclass(frozen=True)
class Reader:
    """A model, and for each layer with experts the module whose first argument is what the layer's router reads."""

    model: LoadedModel
    modules: Mapping[int, nn.Module]


@dataclass(frozen=True)
class Subject:
    """A model with routers to be found."""

    base: Reader  # the dense base
    routed: Reader  # the model itself
    # who reads the text of which languages first: what was learned, without these routers
    experts: Sequence[tuple[Reader, Sequence[str]]]
    put: Callable[[Rows], None]  # gives the model routers
    places: int  # the experts of a router that are the base's FFN, which come first
    # layer → rows of new experts [N, H]; None: one for each of `experts`, which has none yet
    new_rows: Mapping[int, Tensor] | None = None
    # layer → rows of the experts in `places` [places, H], which stay as they are; None: they get a row
    old_rows: Mapping[int, Tensor] | None = None


class Aim(Protocol):
    """The aim of routers: how much text, and the dial."""

    max_tokens: int  # tokens of each text that are used
    max_distance: float | None  # distance up to which the loss is to be smallest
    # share of what was learned from which on the distance is to be smallest; with neither, their sum is
    keep: float | None


class Inputs:
    """The inputs of routers: sums for the regression, and held-out rows as they are."""

    def __init__(self) -> None:
        self.gram: dict[int, Tensor] = {}  # layer → Σ w x xᵀ [H, H]
        self.mean: dict[int, Tensor] = {}  # layer → Σ w x [H]
        self.held_out: dict[int, list[Tensor]] = {}  # layer → [tokens, H]
        self.pieces: Pieces = {}

    def add(self, layer: int, rows_TH: Tensor, weight: float) -> None:
        """Add rows that directions are fitted to."""
        rows_TH = rows_TH.float()
        self.gram[layer] = self.gram.get(layer, 0) + weight * rows_TH.T @ rows_TH
        self.mean[layer] = self.mean.get(layer, 0) + weight * rows_TH.sum(0)

    def hold_out(self, layer: int, rows_TH: Tensor) -> None:
        self.held_out.setdefault(layer, []).append(rows_TH.cpu())


@torch.inference_mode()
def read_inputs(reader: Reader, texts: Mapping[str, Sequence[str]], max_tokens: int, with_start: bool) -> Inputs:
    """Run a model on texts, each of which counts the same, and keep what its routers read.

    Args:
        texts: Name → documents, whose first `max_tokens` are used, in pieces that are read by themselves.
        with_start: Whether the token that every piece starts with counts, too.

    Raises:
        UserError: A text is too short, or the tokenizer does not support it.
    """
    inputs, loaded = Inputs(), reader.model
    with tqdm(total=len(texts), desc=f"reading {loaded.directory.name}", unit=" texts", disable=None) as bar:
        for name, documents in texts.items():
            pieces = [ids for ids in _pieces(tokenize(loaded, name, documents), max_tokens) if len(ids) > 1]
            if not (held_out := pieces[_HELD_OUT - 1 :: _HELD_OUT]):
                raise UserError(
                    f"the text {name} has {sum(map(len, pieces))} tokens in {len(pieces)} pieces; pass at least "
                    f"{_HELD_OUT} documents, or longer ones"
                )
            fitted = [ids for number, ids in enumerate(pieces, start=1) if number % _HELD_OUT]
            weight = 1 / (len(texts) * sum(len(ids) - 1 + with_start for ids in fitted))
            _run(reader, fitted, with_start, partial(inputs.add, weight=weight))
            _run(reader, held_out, with_start, inputs.hold_out)
            inputs.pieces[name] = held_out
            bar.update()
    return inputs


@torch.inference_mode()
def calibrate(
    subject: Subject,
    kept: Mapping[str, Sequence[str]],
    expanded: Mapping[str, Sequence[str]],
    aim: Aim,
    is_checked: bool = True,
) -> tuple[Rows, Findings, Pieces]:
    """Find the routers of a model; returns them, what they do, and the held-out part of each text.

    Args:
        kept: Name → documents whose tokens should stay with the base's FFN. A few that the base cannot tell from
            expanded text are left out with a warning.
        expanded: Language → documents whose tokens should go to what was learned.
        is_checked: Whether routers that are of no use, and texts that cannot be told apart, are an error.

    Raises:
        UserError: A text does not suit, texts cannot be told apart, or no routers do what is asked.
    """
    texts_of = [{language: expanded[language] for language in languages} for _, languages in subject.experts]

    def read_kept(reader: Reader) -> Inputs:
        return read_inputs(reader, kept, aim.max_tokens, True)

    def read_new(readers: Iterable[Reader]) -> list[Inputs]:
        pairs = zip(readers, texts_of, strict=True)
        return [read_inputs(reader, texts, aim.max_tokens, False) for reader, texts in pairs]

    of_kept = read_kept(subject.base)
    alike = _texts_alike(of_kept, read_new([subject.base] * len(texts_of)))
    names = ", ".join(f"{name} ({share:.0%} of its tokens)" for name, share in alike.items())
    if len(alike) > _MOST_ALIKE * len(kept):
        if is_checked:
            raise UserError(
                f"more than a fifth of the texts to keep cannot be told from expanded text: {names}; leave out those "
                "in an expanded language or a close relative of it, or pass more text"
            )
    elif alike:
        print(f"warning: left out, as the base reads it like expanded text: {names}", file=sys.stderr)
        kept = {name: documents for name, documents in kept.items() if name not in alike}
        of_kept = read_kept(subject.base)
    of_new = read_new(reader for reader, _ in subject.experts)
    pieces = of_kept.pieces | {name: its for inputs in of_new for name, its in inputs.pieces.items()}
    expert_of = {language: reader.model for reader, languages in subject.experts for language in languages}

    def losses(model: LoadedModel | None) -> dict[str, float]:
        """The loss of each language by a model, or by its expert."""
        return {language: mean_loss(model or expert_of[language], pieces[language]) for language in expert_of}

    base = remembering(subject.base.model)

    every = of_kept.pieces

    def sample(tokens: int) -> Pieces:
        step = max(1, sum(len(ids) for its in every.values() for ids in its) // tokens)
        return {name: its[number % step :: step] for number, (name, its) in enumerate(every.items())}

    def distances(model: LoadedModel, of: Pieces) -> dict[str, float]:
        return {name: distance(base, model, its) for name, its in of.items() if its}

    by_base, by_expert = losses(subject.base.model), losses(None)
    ends = (
        Point(0.0, _mean(by_base.values())),
        Point(
            _mean(_mean(distances(reader.model, every).values()) for reader, _ in subject.experts),
            _mean(by_expert.values()),
        ),
    )

    def measured(choices: Mapping[int, list[Tensor]], of: Pieces, parts: Parts) -> Point:
        subject.put(_with_parts(choices, parts))
        return Point(_mean(distances(subject.routed.model, of).values()), _mean(losses(subject.routed.model).values()))

    score = partial(_score, ends, aim)
    tried: list[tuple[Point, Rows, list[float]]] = []
    parts: Parts = (_START,) * _PARTS
    for number in range(ROUNDS):
        if number:
            subject.put(tried[-1][1])
            of_kept, of_new = read_kept(subject.routed), read_new([subject.routed] * len(texts_of))
        choices = {layer: _rows(of_kept, of_new, layer, subject) for layer in sorted(of_kept.gram)}
        if number == 0:
            parts = _search(partial(measured, choices, sample(_MEASURED)), parts, score)
        elif number == ROUNDS - 1:
            parts = _search(partial(measured, choices, sample(_LAST_MEASURED)), parts, score)
        point = measured(choices, every, parts)
        tried.append((point, _with_parts(choices, parts), [SHARES[part] for part in parts]))
    point, rows, shares = min(tried, key=lambda one: score(one[0]))
    if is_checked:
        _check_result(*ends, point, aim, is_trained=subject.new_rows is not None)
    subject.put(rows)
    results: dict[str, TextResult] = {}
    of_texts = distances(subject.routed.model, every)
    for name, its in pieces.items():
        first, last = (mean_loss(model, its) for model in (base, subject.routed.model))
        triple = None if name in of_texts else (first, by_expert[name], last)
        choices_of = _first_choices(subject, rows, its)
        results[name] = TextResult(*choices_of, distance=of_texts.get(name), losses=triple, change=last / first - 1)
    left, points = kept_of_learning(*ends, point), [one for one, _, _ in tried]
    return rows, Findings(*ends, point, left, points, shares, results, aim.max_distance, aim.keep), pieces


def kept_of_learning(base: Point, learned: Point, result: Point) -> float:
    """The share of what was learned that is left."""
    return (base.loss - result.loss) / (base.loss - learned.loss) if base.loss != learned.loss else 1.0


def _score(ends: tuple[Point, Point], aim: Aim, point: Point) -> tuple[float, float]:
    """By how much a point misses what is asked, then what is to be smallest."""
    if aim.max_distance is not None:
        return max(0.0, point.distance - aim.max_distance), point.loss
    if aim.keep is not None:
        return max(0.0, aim.keep - kept_of_learning(*ends, point)), point.distance
    is_short = bool(lacks_of(ends[0], kept_of_learning(*ends, point), point))
    return float(is_short), point.distance + point.loss


def _with_parts(choices: Mapping[int, list[Tensor]], parts: Parts) -> Rows:
    return {layer: rows[parts[place * _PARTS // len(choices)]] for place, (layer, rows) in enumerate(choices.items())}


def _search(measured: Callable[[Parts], Point], parts: Parts, score: Callable[[Point], tuple[float, float]]) -> Parts:
    """The shares of the parts from which no neighbor's score is lower."""
    seen = {parts: measured(parts)}
    before: Parts | None = None
    while parts != before:
        before = parts
        for part in range(len(parts)):
            for step in (-1, 1):
                other = (*parts[:part], parts[part] + step, *parts[part + 1 :])
                if not 0 <= other[part] < len(SHARES):
                    continue
                if other not in seen:
                    seen[other] = measured(other)
                if score(seen[other]) < score(seen[parts]):
                    parts = other
    return parts


def _rows(of_kept: Inputs, of_new: Sequence[Inputs], layer: int, subject: Subject) -> list[Tensor]:
    """The router's weight [E, H] for each of `SHARES`."""
    kept_H, *each = _directions(of_kept, of_new, layer)
    new_H = torch.stack(each).sum(0)
    own_NH = torch.stack(each) - new_H / len(each)  # rows of new experts that have none
    rows_by_layer = subject.new_rows or subject.old_rows
    fixed_EH = own_NH if rows_by_layer is None else rows_by_layer[layer].float()
    mean_H = fixed_EH.mean(0)
    kept_TH = torch.cat(of_kept.held_out[layer]).float()
    expanded_TH = torch.cat([rows for inputs in of_new for rows in inputs.held_out[layer]]).float()

    def margin(rows_TH: Tensor) -> Tensor:
        return (rows_TH @ fixed_EH.T).amax(1) - rows_TH @ mean_H

    scores_GT, of_expanded = (
        rows_TH @ kept_H + _THRESHOLDS[:, None] * (rows_TH @ new_H) for rows_TH in (kept_TH, expanded_TH)
    )
    spread = margin(expanded_TH).std()
    is_steep = rows_by_layer is not None and spread > 0
    strength_G1 = _STEEP * spread / of_expanded.std(1, keepdim=True) if is_steep else torch.ones(1, 1)
    strength_G1 = strength_G1.expand(len(_THRESHOLDS), 1)
    if subject.old_rows is None:
        is_kept_GT = strength_G1 * scores_GT > margin(kept_TH)
    else:
        is_kept_GT = strength_G1 * (scores_GT - (kept_TH @ own_NH.T).amax(1)) + margin(kept_TH) > 0
    stays_G = is_kept_GT.float().mean(1)
    weights = []
    for share in SHARES:
        last = max(0, int((stays_G >= share).int().cumprod(0).sum()) - 1)
        row_H = kept_H + _THRESHOLDS[last] * new_H
        if subject.old_rows is None:
            weights.append(torch.cat([(mean_H + strength_G1[last] * row_H).expand(subject.places, -1), fixed_EH]))
        else:
            weights.append(torch.cat([fixed_EH, mean_H + strength_G1[last] * (own_NH - row_H)]))
    return weights


def _directions(of_kept: Inputs, of_new: Sequence[Inputs], layer: int) -> Tensor:
    """u_k and each u_j, the rows of [1 + N, H]: (A + λI)⁻¹ b, with A = Σ w x xᵀ and b = Σ w x over the text of each."""
    device = of_kept.gram[layer].device
    sums = [(inputs.gram[layer].to(device), inputs.mean[layer].to(device)) for inputs in (of_kept, *of_new)]
    return _solve(*sums).cpu()


def _solve(kept: Sums, *new: Sums) -> Tensor:
    gram_HH = kept[0] + sum(gram_HH for gram_HH, _ in new) / len(new)
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean())
    means_H = [kept[1], *(mean_H / len(new) for _, mean_H in new)]
    return torch.linalg.solve(gram_HH, torch.stack(means_H, dim=1)).T


def rows_of_sums(kept: Sums, new: Sequence[Sums], share: float) -> Tensor:
    """The router's weight [1 + N, H] of sums alone, which the order of `new` decides only in the order of rows.

    The threshold is the lowest at which, if scores were normal, a share of text to keep stayed against each new expert.
    """
    kept_H, *each = _solve(kept, *new)
    new_H = torch.stack(each).sum(0)
    new_NH = torch.stack(each) - new_H / len(each)
    rows_GH = kept_H + _THRESHOLDS[:, None] * new_H
    margins_GNH = rows_GH[:, None] - new_NH
    means_GN = margins_GNH @ kept[1]
    variances_GN = ((margins_GNH @ kept[0]) * margins_GNH).sum(-1) - means_GN**2
    stays_G = (means_GN >= NormalDist().inv_cdf(share) * variances_GN.clamp(min=0).sqrt()).all(1)
    last = max(0, int(stays_G.int().cumprod(0).sum()) - 1)
    return torch.cat([rows_GH[last : last + 1], new_NH])


def _texts_alike(of_kept: Inputs, of_new: Sequence[Inputs]) -> dict[str, float]:
    """Texts to keep of which most tokens are beyond the border half way to expanded text, and the share of these.

    Both must have been read by one model: what the base and an expert make of a text is told apart easily.
    """
    ends = [0, *accumulate(sum(map(len, pieces)) for pieces in of_kept.pieces.values())]
    strays = torch.zeros(len(of_kept.pieces))
    for layer, held_out in of_kept.held_out.items():
        kept_H, *each = _directions(of_kept, of_new, layer)
        is_stray_T = torch.cat(held_out).float() @ (kept_H - torch.stack(each).sum(0)) < 0
        strays += torch.tensor([is_stray_T[a:b].float().mean() for a, b in pairwise(ends)]) / len(of_kept.held_out)
    return {name: share for name, share in zip(of_kept.pieces, strays.tolist(), strict=True) if share > 0.5}


def _check_result(base: Point, learned: Point, result: Point, aim: Aim, is_trained: bool) -> None:
    """Check that routers do what is asked, and are better than none, or than those that training gave a model."""
    left, max_distance, keep = kept_of_learning(base, learned, result), aim.max_distance, aim.keep
    if max_distance is not None and result.distance > max_distance:
        raise UserError(
            f"the model would be at least {result.distance:.3f} nats per token from the base, more than --max-distance "
            f"{max_distance:g}; pass a larger one, or more text to keep"
        )
    if keep is not None and left < keep:
        raise UserError(f"at most {left:.1%} of what was learned can be kept, less than --keep {keep:g}; pass less")
    best = min((base, learned) if is_trained else (base,), key=lambda point: point.distance + point.loss)
    if result.distance + result.loss > best.distance + best.loss + 1e-6 and max_distance is None and keep is None:
        what = "the base" if best is base else "it is without them"
        raise UserError(
            f"with these routers, the model would be no better than {what}: KL(base‖model) on held-out text to keep "
            f"{result.distance:.3f} nats per token instead of {best.distance:.3f}, loss of expanded text "
            f"{result.loss:.3f} instead of {best.loss:.3f}; keep what there is, or pass more text"
        )


def _first_choices(subject: Subject, rows: Rows, pieces: list[list[int]]) -> tuple[list[float], float]:
    """Where the tokens of a text go: fractions over all layers, and that of the base's FFN in each of them."""
    choices: dict[int, list[Tensor]] = {}

    def take(layer: int, rows_TH: Tensor) -> None:
        choice_T = (rows_TH.float().cpu() @ rows[layer].T).argmax(1)
        choices.setdefault(layer, []).append((choice_T - subject.places + 1).clamp(min=0))

    _run(subject.routed, pieces, True, take)
    choices_LT = torch.stack([torch.cat(its) for its in choices.values()])
    counts = choices_LT.flatten().bincount(minlength=len(next(iter(rows.values()))) - subject.places + 1)
    return (counts / choices_LT.numel()).tolist(), choices_LT.eq(0).all(0).float().mean().item()


def _mean(numbers: Any) -> float:
    listed = list(numbers)
    return sum(listed) / len(listed)


def _pieces(documents: list[list[int]], max_tokens: int) -> Iterator[list[int]]:
    length = max(1, max_tokens // _PIECES)
    for ids in documents:
        for start in range(0, len(ids), length):
            if max_tokens <= 0:
                return
            yield (piece := ids[start : start + min(length, max_tokens)])
            max_tokens -= len(piece)


def _run(reader: Reader, documents: list[list[int]], with_start: bool, take: Callable[[int, Tensor], None]) -> None:
    """Give `take` the layers' inputs for all tokens of the documents."""
    for batch in make_batches(reader.model, documents, _SETTINGS):
        tokens, targets, is_counted = make_tensors(batch, reader.model.device)
        is_counted = targets != IGNORED if with_start else is_counted
        with ExitStack() as hooks:
            for layer, module in reader.modules.items():
                hook = partial(_take, partial(take, layer), is_counted.flatten(), layer == max(reader.modules))
                hooks.callback(module.register_forward_pre_hook(hook).remove)
            with suppress(_ReadError):
                reader.model.logits(tokens)


class _ReadError(Exception):
    """The last router has read, and the rest of the model is not needed: its output layer may be a fourth of it."""


def _take(take: Callable[[Tensor], None], is_counted_T: Tensor, is_last: bool, module: nn.Module, inputs: Any) -> None:
    rows_TH = inputs[0].flatten(0, -2)
    take(rows_TH[is_counted_T.to(rows_TH.device)])
    if is_last:
        raise _ReadError
