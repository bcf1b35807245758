"""Compare several models, loaded one after another, on the same text.

They are scored, their distance from a base may be measured, and they may continue a prompt from each language's text.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from moelpr.base.checksums import Verify
from moelpr.measure.evaluate.divergence import document_distances
from moelpr.measure.evaluate.models import LoadedModel, choose_device, open_model, read_max_positions, resolve_dtype
from moelpr.measure.evaluate.result_cache import Json, ResultCache, fingerprint_model
from moelpr.measure.evaluate.scoring import LanguageScore, Settings, score_each
from moelpr.measure.report.evaluation_files import TEXT_ITSELF, Continuation
from moelpr.model.families.hf_config import check_model

_PROMPTS_AT_ONCE = 16
PROMPT_WORDS = 7
PROMPT_CHARACTERS = 10  # in scripts without spaces between words
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai
# Before a language: the name of its continuations and distances from the base in the cache.
_PROMPT, _DISTANCE = "continuation ", "distance "


@dataclass(frozen=True)
class Comparison:
    """The results of several models on the same text."""

    models: dict[str, Path]
    settings: Settings  # the same windows for all models
    scores: dict[str, dict[str, LanguageScore]]  # model -> language -> score
    continuation_tokens: int  # maximum length of a continuation; 0 for none
    continuations: dict[str, Continuation]  # language -> continuations of the first words of a document
    # Language -> model, or the text itself -> continuations of several documents.
    continued: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    base: Path | None = None  # the distance of the other models from it is measured

    def scores_on(self, language: str) -> dict[str, LanguageScore]:
        """Model -> score on one language."""
        return {model: scores[language] for model, scores in self.scores.items()}


def compare_models(
    models: Mapping[str, Path],
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    base: Path | None = None,
    continuation_tokens: int = 0,
    num_prompts: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    verify: Verify = Verify.FULL,
    cache: ResultCache | None = None,
) -> Comparison:
    """Score every model on every language, in windows of the same length, so that no model gets more context.

    Args:
        models: Name -> directory.
        documents: Language -> texts.
        base: A model with the same tokenizer, from which the distance of all others is measured.
        continuation_tokens: The length of the continuations of prompts, in tokens; 0: none.
        num_prompts: Documents per language whose first words are continued.
        device, dtype, verify: See `moelpr.measure.evaluate.models.load_model`.

    Raises:
        UserError: A setting does not fit a model, before any is opened; or the tokens of a model are not the base's.
    """
    opened = models if base is None else {**models, f"--base {base}": base}
    settings = (settings or Settings()).resolve({name: read_max_positions(path) for name, path in opened.items()})
    cache = cache or ResultCache(None)
    prompts = {}
    if continuation_tokens:
        for path in models.values():
            check_model(path, is_hf=True)
        prompts = {language: choose_prompts(texts, num_prompts) for language, texts in documents.items()}
    # The batch size is left out because it only affects speed.
    windows = {"sequence_length": settings.sequence_length, "context": settings.context}
    windows |= {"skip_tokens": settings.skip_tokens} if settings.skip_tokens else {}
    keys: dict[str, Json] = {
        language: {**windows, "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        for language, texts in documents.items()
    }
    distances = {}
    if base:
        identity = fingerprint_model(base)
        distances = {_DISTANCE + language: {**key, "base": identity} for language, key in keys.items()}
    for language, pairs in prompts.items():
        keys[_PROMPT + language] = {"prompts": [prompt for prompt, _ in pairs], "tokens": continuation_tokens}

    def measure(name: str, missing: list[str]) -> Iterator[tuple[str, Json]]:
        with open_model(models[name], device, dtype, verify) as loaded:
            if far := [part for part in missing if part in distances]:
                assert base
                with open_model(base, device, dtype, verify) as of_base:
                    for part in far:
                        language = part.removeprefix(_DISTANCE)
                        nats = document_distances(of_base, loaded, language, documents[language], settings)
                        yield part, {"nats": nats}
            texts = {language: documents[language] for language in missing if language in documents}
            for language, score in score_each(loaded, texts, settings, name):
                yield language, asdict(score)
            for part in missing[len(far) + len(texts) :]:
                pairs = prompts[part.removeprefix(_PROMPT)]
                yield part, {"texts": continue_prompts(loaded, [prompt for prompt, _ in pairs], continuation_tokens)}

    results = {}
    for name, directory in models.items():
        of = {"model": fingerprint_model(directory), "dtype": resolve_dtype(dtype, choose_device(device))}
        is_base = base is not None and base.resolve() == directory.resolve()
        model_keys = {part: {**of, **key} for part, key in (keys if is_base else distances | keys).items()}
        results[name] = cache.complete(name, model_keys, partial(measure, name))
    scores = {
        name: {
            language: replace(
                LanguageScore.from_json(result[language]),
                document_distances=result.get(_DISTANCE + language, {}).get("nats"),
            )
            for language in documents
        }
        for name, result in results.items()
    }
    continuations, continued = {}, {}
    for language, pairs in prompts.items():
        by_model = {name: result[_PROMPT + language]["texts"] for name, result in results.items()}
        continuations[language] = Continuation(*pairs[0], {name: texts[0] for name, texts in by_model.items()})
        # As long as the models' continuations, so that its language shows as well as theirs.
        lengths = [max(map(len, texts)) for texts in zip(*by_model.values(), strict=True)]
        own = [reference[:length] for (_, reference), length in zip(pairs, lengths, strict=True)]
        continued[language] = by_model | {TEXT_ITSELF: own}
    return Comparison(dict(models), settings, scores, continuation_tokens, continuations, continued, base)


def choose_prompts(documents: Sequence[str], number: int) -> list[tuple[str, str]]:
    """The first words of the first documents whose line continues for as long again, or else of the longest one.

    Returns these words, and the rest of the line as reference.
    """
    best, chosen = ("", ""), []
    for document in documents:
        line = document.strip().split("\n", 1)[0]
        words = list(re.finditer(r"\S+", line))[:PROMPT_WORDS]
        cut = words[-1].end() if words else 0
        if len(_NO_SPACES.findall(line[:40])) > 10:
            cut = PROMPT_CHARACTERS
        prompt, reference = line[:cut].rstrip(), line[cut:].strip()
        if len(reference) >= len(prompt) > 0:
            chosen.append((prompt, reference))
            if len(chosen) == number:
                break
        best = max(best, (prompt, reference), key=lambda parts: len(parts[0]) + len(parts[1]))
    return chosen or [best]


@torch.inference_mode()
def continue_prompts(loaded: LoadedModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Continue prompts with the most likely token each time, at most `max_new_tokens`, up to EOS or a line break.

    `loaded` must be a Hugging Face model.
    """
    from transformers import GenerationConfig

    pad_id = loaded.eos_id if loaded.eos_id is not None else loaded.start_id
    ends = {"eos_token_id": loaded.eos_id, "pad_token_id": pad_id}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0, **ends)
    texts = []
    for batch in itertools.batched(prompts, _PROMPTS_AT_ONCE):
        ids = [[loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in batch]
        longest = max(map(len, ids))
        padding = [longest - len(one) for one in ids]
        inputs = torch.tensor([[pad_id] * pad + one for pad, one in zip(padding, ids, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        output = loaded.model.generate(
            inputs.to(loaded.device), attention_mask=mask.to(loaded.device), generation_config=config
        )
        for pad, one, sequence in zip(padding, ids, output.tolist(), strict=True):
            # Decoded together with the prompt, because some tokenizers drop a leading space.
            prompt_text = loaded.tokenizer.decode(one[1:], skip_special_tokens=True)
            text = loaded.tokenizer.decode(sequence[pad + 1 :], skip_special_tokens=True)[len(prompt_text) :]
            line = next((line for line in text.split("\n") if line.strip()), "")
            texts.append(line.rstrip("\ufffd "))  # the last character may be incomplete
    return texts
