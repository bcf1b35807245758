"""Several models on the same text, loaded one after another; results are cached as they come."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moelpr.checkpoints import checkpoint_chain
from moelpr.errors import UserError
from moelpr.evaluate.generate import choose_prompt, continue_prompt
from moelpr.evaluate.models import is_megatron, open_model, read_max_positions
from moelpr.evaluate.scoring import LanguageScore, Settings, score_each
from moelpr.files import atomic_file
from moelpr.model_spec import FILE_NAME
from moelpr.run_folder import HF_FOLDER

FORMAT_VERSION = 1
CACHE_FOLDER = "parts"
_PROMPT = "continuation "  # before a language: a continuation's name in the cache


@dataclass(frozen=True)
class Continuation:
    """A prompt from a held-out document, how the document continues, and how each model does (model -> text)."""

    prompt: str
    reference: str
    by_model: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What several models do on the same text."""

    models: dict[str, Path]
    settings: Settings  # the same windows for all models
    scores: dict[str, dict[str, LanguageScore]]  # model -> language -> score
    continuation_tokens: int  # maximum length of a continuation; 0 for none
    continuations: dict[str, Continuation]  # by language

    def scores_on(self, language: str) -> dict[str, LanguageScore]:
        """Model -> score on one language."""
        return {model: scores[language] for model, scores in self.scores.items()}


def compare_models(
    models: Mapping[str, Path],
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    continuation_tokens: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    cache: "ResultCache | None" = None,
) -> Comparison:
    """Score every model on every language, in windows of the same length, so that no model gets more context.

    Args:
        models: name -> directory.
        documents: language -> texts.
        settings: windows and batches.
        continuation_tokens: length of the continuations of a prompt per language, in tokens; 0: none.
        device, dtype: see `moelpr.evaluate.models.load_model`.
        cache: where results are kept, and those of an earlier run are read.

    Raises:
        UserError: before a model is opened, if a setting does not fit a model.
    """
    settings = (settings or Settings()).resolve({name: read_max_positions(path) for name, path in models.items()})
    cache = cache or ResultCache(None)
    checkpoints = [name for name, directory in models.items() if is_megatron(directory)]
    if continuation_tokens and checkpoints:
        raise UserError(
            f"--continuations requires Hugging Face directories, {checkpoints[0]} is a Megatron checkpoint; export it "
            "with checkpoint_convert/mcore_to_hf.py"
        )
    digests = {
        language: hashlib.sha256(json.dumps(texts).encode()).hexdigest() for language, texts in documents.items()
    }
    prompts = {language: choose_prompt(texts) for language, texts in documents.items()} if continuation_tokens else {}
    results: dict[str, dict[str, dict[str, Any]]] = {}  # model -> what is cached under one name -> result
    for name, directory in models.items():
        of = {"model": fingerprint_model(directory), "dtype": dtype}
        keys = {language: {**of, **settings.identity, "text": digest} for language, digest in digests.items()}
        for language, prompt in prompts.items():
            keys[_PROMPT + language] = {**of, "prompt": prompt.text, "tokens": continuation_tokens}
        found = {part: result for part, key in keys.items() if (result := cache.read(name, part, key)) is not None}
        if len(found) < len(keys):
            missing = {language: texts for language, texts in documents.items() if language not in found}
            with open_model(directory, device, dtype) as loaded:
                for language, score in score_each(loaded, missing, settings, name):
                    found[language] = score.to_json()
                    cache.write(name, language, keys[language], found[language])
                for part in [part for part in keys if part not in found]:
                    text = continue_prompt(loaded, prompts[part.removeprefix(_PROMPT)].text, continuation_tokens)
                    found[part] = {"text": text}
                    cache.write(name, part, keys[part], found[part])
        results[name] = found
    scores = {
        name: {language: LanguageScore.from_json(found[language]) for language in documents}
        for name, found in results.items()
    }
    continuations = {
        language: Continuation(
            prompt.text, prompt.reference, {name: found[_PROMPT + language]["text"] for name, found in results.items()}
        )
        for language, prompt in prompts.items()
    }
    return Comparison(dict(models), settings, scores, continuation_tokens, continuations)


class ResultCache:
    """Results in an evaluation's folder, one file each (`parts/MODEL/NAME.json`), so that a rerun resumes.

    Each file records what it was computed from. A result with a different key is not used, but computed again.
    """

    def __init__(self, folder: Path | None):
        """`folder` is the evaluation's --output; None caches nothing."""
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file; pass a folder")
        if folder and folder.is_dir() and any(folder.iterdir()) and not (folder / CACHE_FOLDER).is_dir():
            raise UserError(f"--output {folder} is not an evaluation folder; choose another")
        self._folder = folder and folder / CACHE_FOLDER

    def read(self, model: str, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """The result computed from exactly `key`, or None."""
        try:
            content = json.loads(self._path(model, name).read_text(encoding="utf-8")) if self._folder else {}
            return content["result"] if content["of"] == _with_version(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, model: str, name: str, key: dict[str, Any], result: dict[str, Any]) -> None:
        if self._folder:
            with atomic_file(self._path(model, name)) as temporary:
                content = {"of": _with_version(key), "result": result}
                temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def _path(self, model: str, name: str) -> Path:
        assert self._folder
        return self._folder / quote(model, safe="") / f"{quote(name, safe='')}.json"


def _with_version(key: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **key}


def fingerprint_model(directory: Path) -> str:
    """A digest of its files' names, sizes and times; the weights are too large to be read."""
    if is_megatron(directory):
        folders = [directory / HF_FOLDER, *checkpoint_chain(directory)]
        return fingerprint_files([directory / FILE_NAME, *(file for folder in folders for file in folder.rglob("*"))])
    return fingerprint_files(file for file in directory.iterdir() if file.suffix != ".md")


def fingerprint_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
