"""The first tasks of a project: the base, its tokenizer, and a corpus of each language."""

from pathlib import Path
from typing import Any

from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.project.places import Places
from moelpr.project.project import Replay
from moelpr.project.reading import local_files, text_bytes, versions
from moelpr.project.steps import settings, stage_flags, words
from moelpr.project.workflow.task import Task

# The aim is so many bytes of held-out text, but at most one document in twenty.
_HELD_OUT_BYTES, _MOST_HELD_OUT = 2e7, 0.05
_BYTES_PER_MINUTE, _WORKERS = 6e8, 8
_DOWNLOADED = ("model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def text_tasks(places: Places) -> list[Task]:
    """The tasks before the model, in order."""
    project = places.project
    found = [download(places)] if places.is_downloaded else []
    found += [vocabulary(places)] if project.vocabulary else []
    if not project.corpora:
        found += [preprocess(places, code) for code in places.languages]
        found += [replay(places, places.replay)] if places.replay else []
    return [*found, *(conversations(places, code) for code in places.conversations)]


def download(places: Places) -> Task:
    """Fetch the base from the Hub: weights, configuration and tokenizer, but no pickles and no code."""
    command = ["-m", "huggingface_hub.cli.hf", "download", places.model_name, "--local-dir", str(places.base)]
    command += [word for pattern in _DOWNLOADED for word in ("--include", pattern)]
    command += ["--revision", places.revision] if places.revision else []
    return Task(
        name="download", command=command, is_complete=(places.base / CONFIG_FILE).is_file, shared=_shared(places)
    )


def vocabulary(places: Places) -> Task:
    """Extend the base's tokenizer."""
    assert places.project.vocabulary is not None
    fixed: dict[str, Any] = {"tokenizer": places.base}
    for flag, codes in (("input", places.expanded), ("original", places.original)):
        fixed[flag] = [f"{code}={text}" for code in codes for text in places.languages[code].text]
    fixed |= {"num-new-tokens": places.project.vocabulary.new_tokens, "save": places.tokenizer, "overwrite": True}
    return Task(
        name="vocabulary",
        command=words("vocabulary", places.own("vocabulary"), fixed),
        settings=settings(places.own("vocabulary")),
        made_from=places.base_task,
        files=tuple(path for language in places.languages.values() for path in local_files(language.text)),
        versions=versions(*(name for language in places.languages.values() for name in language.text)),
        is_complete=(places.tokenizer / "vocabulary_extension.json").is_file,
        shared=_shared(places),
    )


def preprocess(places: Places, code: str) -> Task:
    """Tokenize the text of a language, of which some is held out; of an original one, no more than stage 2 can use."""
    language, project = places.languages[code], places.project
    is_sample = code in places.original and not (project.mix.replay or project.text_output)
    size = text_bytes(language)
    share = None if language.held_out else held_out_share(size)
    corpora = [places.corpus(code), *([places.corpus(f"{code}_validation")] if share else [])]
    fixed: dict[str, Any] = {
        "append-eod": True,
        "json-keys": language.json_key,
        "filter": language.filter,
        "validation-share": share,
        "max-samples": 2 * (project.replay or Replay()).original_documents if is_sample else None,
    }
    return _tokenize(
        places,
        "preprocess",
        code,
        language.text,
        places.text / "data" / code,
        fixed,
        is_complete=places.manifest(code).is_file,
        corpora=() if is_sample else tuple(corpora),  # a sample is made by one job
        shared=_shared(places),
        minutes=0.1 + size / _BYTES_PER_MINUTE,
        disk_gib=2 * size / 2**30,
    )


def conversations(places: Places, code: str) -> Task:
    """Tokenize the conversations of a language by the chat template."""
    corpus = places.chat_corpus(code)
    fixed: dict[str, Any] = {
        "conversations": True,
        "chat-template-from": places.project.chat_template,
        "max-tokens": stage_flags("sft", places.own("sft")).get("seq-length"),
    }
    return _tokenize(
        places,
        "conversations",
        code,
        places.languages[code].conversations,
        corpus.with_name(corpus.name.removesuffix("_messages_document")),
        fixed,
        is_complete=Path(f"{corpus}.manifest.json").is_file,
        corpora=(corpus,),
    )


def _tokenize(
    places: Places, step: str, code: str, names: list[str], prefix: Path, fixed: dict[str, Any], **fields: Any
) -> Task:
    """Tokenize files of a language into corpora with a prefix."""
    own = places.own(step)
    fixed = {
        "input": names,
        "output-prefix": prefix,
        "language": code,
        "original-languages": ",".join(places.original),
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": places.tokenizer,
        **fixed,
        "resume": True,
        "overwrite": True,
    }
    return Task(
        name=f"{step}-{code}",
        command=words(step, own, fixed),
        settings=settings(own),
        made_from=("vocabulary",) if places.project.vocabulary else places.base_task,
        files=tuple(local_files(names)),
        versions=versions(*names),
        unfinished=(prefix.with_name(f".{prefix.name}.unfinished"),),
        cpus=int(own.get("workers", _WORKERS)),
        **fields,
    )


def replay(places: Places, sizes: Replay) -> Task:
    """Sample the text of stage 2 from the corpora of all languages."""
    fixed: dict[str, Any] = {
        "input": [places.corpus(code) for code in places.languages],
        "output-prefix": places.corpus("replay"),
        "original-documents": sizes.original_documents,
        "expanded-documents": sizes.expanded_documents,
        "overwrite": True,
    }
    return Task(
        name="replay",
        command=words("replay", places.own("replay"), fixed),
        made_from=tuple(f"preprocess-{code}" for code in places.languages),
        is_complete=Path(f"{places.corpus('replay')}.idx").is_file,
    )


def _shared(places: Places) -> Path | None:
    """The folder in which other projects may have done a task."""
    return places.text if places.project.text_output else None


def held_out_share(size: int) -> float:
    """The fraction of the documents to hold out, to one digit: enough to evaluate on, at most one in twenty."""
    return min(_MOST_HELD_OUT, float(f"{_HELD_OUT_BYTES / max(size, 1):.0e}"))
