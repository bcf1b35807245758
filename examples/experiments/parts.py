"""Measure parts of documents apart, by several models at once, such as the two sides of mixed text.

A model reads a whole document, from its start token on; parts are tokenized one by one, and each counts as what it is
called.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.languages import EXPANDED
from moelpr.base.files import atomic_directory
from moelpr.data.text.language_id import Detector
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.measure.evaluate.confidence import Estimate, estimates, mean
from moelpr.measure.evaluate.models import LoadedModel, load_model
from moelpr.measure.evaluate.result_cache import ResultCache, fingerprint_model
from moelpr.measure.evaluate.scoring import LanguageScore

KEPT, NEW, UNCOUNTED = "kept", "new", "uncounted"  # a part counts as one of these
SWITCHED = ("full", "lora-alone")  # projects without replay text, which are no use but behind a switch
DETECTOR, ORACLE = "py3langid", "an oracle"  # ways to switch
FIRST_TOKENS = 32  # by which language identification switches
Document = Sequence[tuple[str, str]]  # parts: what it counts as, and its text
Texts = Mapping[str, Sequence[Document]]  # name → documents
Rows = NDArray[np.float64]  # [documents, (bits, bytes, tokens, nats from the base)]
Scores = dict[str, dict[str, dict[str, Rows]]]  # model → text → what parts count as → numbers


def measure(models: Mapping[str, Path], texts: Texts, output: Path) -> tuple[Scores, dict[str, float]]:
    """The numbers and CPU minutes of models, the base first; what the output folder has is not measured again."""
    cache, base = ResultCache(output), next(iter(models))
    identities = {name: fingerprint_model(path) for name, path in models.items()}
    opened: dict[str, LoadedModel] = {}
    scores, minutes = Scores((name, {}) for name in models), dict.fromkeys(models, 0.0)
    for text, documents in texts.items():
        of = {"base": identities[base], "text": hashlib.sha256(json.dumps(documents).encode()).hexdigest()}
        keys = {name: {"model": identity, **of} for name, identity in identities.items()}
        results: dict[str, Any] = {name: cache.read(name, text, key) for name, key in keys.items()}
        if missing := [name for name, result in results.items() if result is None]:
            opened |= {x: load_model(models[x], dtype="bfloat16") for x in {base, *missing} - opened.keys()}
            start = time.process_time()
            found = _measure({name: opened[name] for name in missing}, opened[base], documents)
            cost = (time.process_time() - start) / len(missing)
            for name, parts in found.items():
                results[name] = {"parts": {what: rows.tolist() for what, rows in parts.items()}, "cpu_s": cost}
                cache.write(name, text, keys[name], results[name])
            print(f"{output}: {text}, {', '.join(missing)}, {cost * len(missing):.0f} s of CPU", flush=True)
        for name, result in results.items():
            scores[name][text] = {what: np.array(rows) for what, rows in result["parts"].items()}
            minutes[name] += result["cpu_s"] / 60
    return scores, minutes


@torch.inference_mode()
def _measure(
    models: Mapping[str, LoadedModel], base: LoadedModel, documents: Sequence[Document]
) -> dict[str, dict[str, Rows]]:
    """Model → what parts count as → numbers of each document."""
    found: dict[str, dict[str, Rows]] = {name: {} for name in models}
    for number, document in enumerate(documents):
        ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in document]
        tokens = torch.tensor([[base.start_id, *chain.from_iterable(ids)]], device=base.device)
        of_base = base.logits(tokens)[0, :-1].float().log_softmax(-1)
        for name, loaded in models.items():
            of_model = of_base if loaded is base else loaded.logits(tokens)[0, :-1].float().log_softmax(-1)
            bits = -of_model.gather(1, tokens[0, 1:, None])[:, 0].double() / math.log(2)
            nats = (of_base.exp() * (of_base - of_model)).sum(-1).clamp(min=0).double()
            columns = torch.stack([bits, nats], 1).split([len(its) for its in ids])
            for (what, text), its in zip(document, columns, strict=True):
                rows = found[name].setdefault(what, np.zeros((len(documents), 4)))
                rows[number] += its[:, 0].sum().item(), len(text.encode()), len(its), its[:, 1].sum().item()
    return found


def add_switches(scores: Scores, texts: Texts, base: Path) -> None:
    """Add switches that choose the base or a rival for each document: by its first tokens, or if it has a new part."""
    tokenizer, detector, off = open_hf_tokenizer(base), Detector(frozenset(), 0.0), next(iter(scores.values()))

    def is_detected(document: Document) -> bool:
        ids = tokenizer("".join(text for _, text in document), add_special_tokens=False)["input_ids"]
        return detector.language(tokenizer.decode(ids[:FIRST_TOKENS])) in EXPANDED

    for rival in [name for name in scores if without_seed(name) in SWITCHED]:
        for way in (DETECTOR, ORACLE):
            chosen = scores[f"{rival}, switched by {way}"] = {}
            for text, documents in texts.items():
                has_new = [any(what == NEW for what, _ in one) for one in documents]
                is_on = np.array([*map(is_detected, documents)] if way == DETECTOR else has_new)[:, None]
                parts = scores[rival][text].items()
                chosen[text] = {what: np.where(is_on, rows, off[text][what]) for what, rows in parts}


def write_mean(base: Path, tuned: Path, output: Path) -> None:
    """Write the mean of the weights of two models as a Hugging Face directory, with the base's tokenizer."""
    mean, other = (load_model(folder, "cpu", "float32") for folder in (base, tuned))
    weights = other.model.state_dict()
    mean.model.load_state_dict({name: one.lerp(weights[name], 0.5) for name, one in mean.model.state_dict().items()})
    with atomic_directory(output) as folder:
        mean.model.save_pretrained(folder)
        mean.tokenizer.save_pretrained(folder)


def against_base(scores: Scores, text: str, what: str) -> dict[str, dict[str, Estimate]]:
    """Model → the change of bits per byte against the first, and the distance from it, of some parts of a text.

    A model of several seeds has the mean of theirs, and each bootstrap sample draws as many of them as there are.
    """
    found = estimates({model: score_of(of[text][what]) for model, of in scores.items()}, seed=1)
    bits, seeds = next(iter(found.values()))["bits_per_byte"], dict[str, list[Any]]()
    for model, of in found.items():
        seeds.setdefault(without_seed(model), []).append((of["bits_per_byte"] / bits - 1, of["distance"]))
    return {
        model: dict(zip(("change", "distance"), map(_over_seeds, zip(*its, strict=True)), strict=True))
        for model, its in seeds.items()
    }


def without_seed(model: str) -> str:
    """The name that models of one project share, whatever their seed."""
    return re.sub(r"-seed\d+", "", model)


def _over_seeds(found: Sequence[Estimate]) -> Estimate:
    drawn = np.random.default_rng(1).integers(len(found), size=(len(found), len(found[0])))
    drawn[:, 0] = range(len(found))  # the number itself
    return mean(list(np.take_along_axis(np.array(found), drawn, axis=0)))


def score_of(rows: Rows) -> LanguageScore:
    bits, sizes, tokens, nats = rows.T.tolist()
    return LanguageScore(bits, sizes, tokens, [0] * len(bits), 0, None, nats)
