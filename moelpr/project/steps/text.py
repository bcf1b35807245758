"""The steps before the model: the base, its tokenizer, and a corpus of each language."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moelpr.base.languages import is_code
from moelpr.data.text.kept_languages import CODE
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.project.file import text_bytes
from moelpr.project.project import Replay
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.step import AUTO, MOE_LPR, SECOND_FFN, Step, has_corpora, step, texts_read
from moelpr.project.workflow.task import Task

# The aim is so many bytes of held-out text, but at most one document in twenty.
_HELD_OUT_BYTES, _MOST_HELD_OUT = 2e7, 0.05
_BYTES_PER_MINUTE, _WORKERS = 6e8, 8
MODEL_FILES = ("model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "*_tokens*.json", "chat_template*")
_RESERVED = (
    "input output-prefix language original-languages expanded-languages tokenizer-type tokenizer-model resume "
    "overwrite conversations chat-template-from"
)
_SPEED = "workers log-interval"


@step("download")
def download(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Fetch the base from the Hub: weights, configuration and tokenizer, but no pickles and no code."""
    if not project.is_downloaded:
        return
    command = ["-m", "huggingface_hub.cli.hf", "download", project.model_name, "--local-dir", str(project.base)]
    command += [word for pattern in MODEL_FILES for word in ("--include", pattern)]
    command += ["--revision", project.revision] if project.revision else []

    def is_complete() -> bool:
        return (project.base / CONFIG_FILE).is_file() and any(project.base.glob("model*.safetensors"))

    yield Task(name=step.name, command=command, is_complete=is_complete, shared=project.shared)


@step(
    "vocabulary",
    "data extend-tokenizer",
    reserved="tokenizer input original save overwrite",
    speed="workers",
    methods=MOE_LPR,
)
def vocabulary(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Extend the base's tokenizer."""
    if project.content.vocabulary is None:
        return
    flags: dict[str, Any] = {"tokenizer": project.base}
    for flag, codes in (("input", project.expanded), ("original", project.original)):
        flags[flag] = [f"{code}={text}" for code in codes for text in project.languages[code].text]
    flags |= {"num-new-tokens": project.content.vocabulary.new_tokens, "save": project.tokenizer, "overwrite": True}
    texts = {code: language.text for code, language in project.languages.items()}
    yield step.task(
        project,
        flags,
        made_from=project.base_task,
        **texts_read(project, texts, *([] if project.base_task else _tokenizer_files(project.base))),
        is_complete=(project.tokenizer / "vocabulary_extension.json").is_file,
        shared=project.shared,
    )


@step("kept", "data kept", reserved="save without json-key overwrite", methods=MOE_LPR | SECOND_FFN)
def kept(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Fetch text to keep in other languages, and code."""
    if not project.kept_task:
        return
    folder = project.text / step.name
    json_key = next(iter(project.languages.values())).json_key
    flags = {"save": folder, "without": ",".join(project.languages), "json-key": json_key, "overwrite": True}
    yield step.task(project, flags, is_complete=(folder / f"{CODE}.jsonl").is_file, shared=project.shared)


@step("preprocess", "data preprocess", reserved=_RESERVED, speed=_SPEED)
def preprocess(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Tokenize the text of a language, of which some is held out; of an original one, no more than stage 2 can use."""
    for code, language in project.languages.items() if not project.content.corpora else ():
        is_sample = code in project.original and not (project.content.mix.replay or project.content.text_output)
        size = text_bytes(project.file, code)
        share = None if language.held_out else held_out_share(size)
        corpora = [project.corpus(code), *([project.corpus(f"{code}_validation")] if share else [])]
        flags: dict[str, Any] = {
            "append-eod": True,
            "json-keys": language.json_key,
            "filter": language.filter,
            "validation-share": share,
            "max-samples": 2 * (project.content.replay or Replay()).original_documents if is_sample else None,
        }
        yield _tokenize(
            step,
            project,
            code,
            language.text,
            project.text / "data" / code,
            flags,
            is_complete=partial(has_corpora, *corpora),
            corpora=() if is_sample else tuple(corpora),  # a sample is made by one job
            shared=project.shared,
            minutes=0.1 + size / _BYTES_PER_MINUTE,
            disk_gib=2 * size / 2**30,
        )


@step("conversations", "data preprocess", reserved=_RESERVED, speed=_SPEED, methods=MOE_LPR)
def conversations(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Tokenize the conversations of a language by the chat template."""
    for code in project.conversations:
        corpus = project.chat_corpus(code)
        flags: dict[str, Any] = {
            "conversations": True,
            "chat-template-from": project.content.chat_template,
            "max-tokens": project.stage_flags("sft").get("seq-length"),
        }
        yield _tokenize(
            step,
            project,
            code,
            project.languages[code].conversations,
            corpus.with_name(corpus.name.removesuffix("_messages_document")),
            flags,
            _tokenizer_files(Path(project.content.chat_template)) if project.content.chat_template else (),
            is_complete=partial(has_corpora, corpus),
            corpora=(corpus,),
        )


def _tokenize(
    step: Step,
    project: ResolvedProject,
    code: str,
    names: list[str],
    prefix: Path,
    flags: dict[str, Any],
    files: Sequence[Path] = (),
    **fields: Any,
) -> Task:
    """Tokenize files of a language into corpora with a prefix."""
    flags = {
        "input": names,
        "output-prefix": prefix,
        "language": code,
        "original-languages": ",".join(project.original),
        "expanded-languages": None if is_code(code) or code in project.original else code,
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": project.tokenizer,
        **flags,
        "resume": True,
        "overwrite": True,
    }
    return step.task(
        project,
        flags,
        name=f"{step.name}-{code}",
        made_from=project.tokenizer_task,
        **texts_read(
            project, {code: names}, *([] if project.tokenizer_task else _tokenizer_files(project.tokenizer)), *files
        ),
        unfinished=(prefix.with_name(f".{prefix.name}.unfinished"),),
        cpus=int(project.own(step.name).get("workers", _WORKERS)),
        **fields,
    )


@step("replay", "data sample", reserved="input output-prefix overwrite", methods=MOE_LPR | AUTO)
def replay(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Sample the text of stage 2 from the corpora of all languages."""
    if project.replay is None or project.content.corpora:
        return
    flags: dict[str, Any] = {
        "input": [project.corpus(code) for code in project.languages],
        "output-prefix": project.corpus("replay"),
        "original-documents": project.replay.original_documents,
        "expanded-documents": project.replay.expanded_documents,
        "overwrite": True,
    }
    made_from = tuple(f"preprocess-{code}" for code in project.languages)
    yield step.task(project, flags, made_from=made_from, is_complete=partial(has_corpora, project.corpus("replay")))


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder that no task makes."""
    return sorted(path for pattern in _TOKENIZER for path in folder.glob(pattern))


def held_out_share(size: int) -> float:
    """The fraction of the documents to hold out, to one digit: enough to evaluate on, at most one in twenty."""
    return min(_MOST_HELD_OUT, float(f"{_HELD_OUT_BYTES / max(size, 1):.0e}"))
