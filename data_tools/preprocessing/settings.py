"""The settings of moelpr data preprocess, and which of them exclude or require each other."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from moelpr.base.errors import UserError
from moelpr.base.languages import is_code as is_language
from moelpr.base.machine import available_cpus
from moelpr.base.settings import Count, File, Flags, Folder, either, metavar, number
from moelpr.data.text.sources import STANDARD_INPUT

REGISTRY_FILE = "dataset_info.json"
# Defaults of flags that require others; the checks must see them as they were passed.
_DEFAULTS = {"min_confidence": 0.5, "undetected": "expanded", "max_bad_share": 0.01}
_WORKERS_PER_CPU = 8
_CORES = available_cpus()
KEPT = "kept"  # text like no replay and no expanded language, whose bit is original
GROUPS = ("original", "expanded", KEPT)
_LANGUAGE_FLAGS = ("--language", "--language-key", "--spans-key", "--detect-language")
_OPTIONAL_VALUE = {"nargs": "?", "const": "document"}
_INPUT, _LANGUAGE, _NAMES = either("input", required=True), either("language"), metavar("A,B")


class _Input(Flags):
    """input (files, or datasets of a registry)"""

    # JSON lines or Parquet: files, folders, patterns, URIs; - for standard input
    input: Annotated[list[str], _INPUT, metavar("FILE")] = []
    dataset: Annotated[str | None, _INPUT, _NAMES] = None  # datasets of the registry, read in this order
    dataset_info: File | None = None  # the registry (default: dataset_info.json in --dataset-dir)
    dataset_dir: Folder | None = None  # folder of the datasets' files (default: the registry's)
    json_keys: list[str] = []  # JSON text keys, a corpus for each (default: text, or messages of --conversations)
    # keep documents by their keys or columns: comparisons, and, or, not, in [...], is_null(key), such as
    # 'language_score >= 0.9'
    filter: str | None = None
    max_samples: Count | None = None  # random documents of each --dataset or all --input before --filter (default: all)


class _Conversations(Flags):
    """conversations (docs/chat.md)"""

    conversations: bool = False  # documents are lists of messages, of which only assistant turns count in the loss
    chat_template_from: str | None = None  # folder of a chat model, or a template (default: --tokenizer-model)
    # --seq-length of training; a longer conversation is malformed (default: any length)
    max_tokens: Count | None = None


class _Output(Flags):
    """output"""

    output_prefix: Annotated[str, metavar("P")]  # write P_<key>_document.bin, .idx and .lang
    validation_share: Annotated[float, number(float, 0, below=1)] = 0.0  # fraction held out, in P_validation…
    seed: Annotated[int, number(int, 0, below=1 << 63)] = 1234  # seed of --max-samples and --validation-share
    overwrite: bool = False  # replace an existing corpus


class TokenizerFlags(Flags):
    """tokenizer"""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]  # tokenizer library
    tokenizer_model: str  # folder with tokenizer.json, or a SentencePiece .model file
    tokenizer_hf_no_include_special_tokens: bool = False  # add no special tokens around a text
    eod_token: str | None = None  # end of each document, such as '<|endoftext|>' (default: the tokenizer's)


class _Tokenizer(TokenizerFlags):
    """tokens"""

    append_eod: bool = False  # end each document with the end-of-document token
    tokenizer_backend: Literal["auto", "reference", "gigatoken"] = "auto"  # auto: gigatoken if it gives the same IDs


class _Language(Flags):
    """language bit (--input requires one of the first four; a registry states it)"""

    # language of all documents, such as eu; or their group: original, expanded or kept
    language: Annotated[str | None, _LANGUAGE] = None
    language_key: Annotated[str | None, _LANGUAGE] = None  # JSON key of a document's language
    spans_key: Annotated[str | None, _LANGUAGE] = None  # JSON key of a document's [{"text": …, "lang": …}, …]
    # detect the language with py3langid, per document (default) or per line
    detect_language: Annotated[Literal["document", "line"] | None, _LANGUAGE, _OPTIONAL_VALUE] = None
    original_languages: Annotated[str | None, _NAMES] = None  # languages whose bit is original
    expanded_languages: Annotated[str | None, _NAMES] = None  # all expanded languages (default: all others)
    min_confidence: Annotated[Any, number(float, 0, 1)] = None  # below it, a language is uncertain (default: 0.5)
    undetected: Literal["expanded", "original", "skip"] | None = None  # tag of uncertain documents (default: expanded)
    audit: bool = False  # detect languages too, and print them against the stated ones


class _Execution(Flags):
    """execution"""

    workers: Count = _CORES  # worker processes (default: one per core)
    num_shards: Count = 1  # number of jobs that share the input
    shard: int | None = None  # index of this job, from 0; part of its files' names
    resume: bool = False  # resume an interrupted job, or start a new one
    log_interval: Count = 10_000  # documents between log lines
    on_error: Literal["stop", "skip"] = "stop"  # stop at a malformed line, or skip it and list it in P.skipped.txt
    # with --on-error skip, most malformed lines (default: 0.01)
    max_bad_share: Annotated[Any, number(float, 0, 1)] = None


class Settings(_Execution, _Language, _Tokenizer, _Output, _Conversations, _Input):
    def __post_init__(self) -> None:
        flag = next((flag for flag in _LANGUAGE_FLAGS if getattr(self, flag[2:].replace("-", "_"))), None)
        if self.input and flag is None:
            raise UserError(f"--input requires one of {', '.join(_LANGUAGE_FLAGS)}")
        _check(self, flag or "--dataset")
        if self.dataset:
            self.dataset_info = self.dataset_info or Path(self.dataset_dir or "", REGISTRY_FILE)
        self.json_keys = self.json_keys or ["messages" if self.conversations else "text"]
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.audit |= self.language == KEPT and bool(self.expanded_languages)


def _check(args: Settings, language_flag: str) -> None:
    """Raise an error if flags exclude or require each other."""
    if args.workers > (most := _WORKERS_PER_CPU * _CORES):
        raise UserError(
            f"--workers must be at most {most}, {_WORKERS_PER_CPU} per CPU of the {_CORES} available, got "
            f"{args.workers}; use {_CORES}, because more are not faster, and each needs memory"
        )
    is_code = language_flag == "--language" and args.language not in GROUPS
    has_names = is_code or language_flag not in ("--language", "--dataset")
    named = args.original_languages or (is_code and args.expanded_languages)
    listed = f"{args.original_languages},{args.expanded_languages}".split(",")
    keys, last, is_sampled = [*args.json_keys], args.num_shards - 1, args.max_samples is not None
    streams = args.input.count(STANDARD_INPUT)
    registry = args.dataset_info or args.dataset_dir
    rules = {
        "--dataset requires --dataset-info, the registry, or --dataset-dir, its folder": args.dataset and not registry,
        "--dataset-info and --dataset-dir require --dataset, the names of datasets": registry and not args.dataset,
        "--json-keys requires --input; a registry states the key of the text": args.dataset and keys,
        f"--json-keys {' '.join(keys)} names a key twice": len(set(keys)) < len(keys),
        "--input - (standard input) can be read only once": streams > 1,
        "--input - requires standard input, which is closed; redirect or pipe text into it": streams and not sys.stdin,
        "--input - (standard input) excludes --num-shards and --max-samples; write it to a file first": (
            streams and (last or is_sampled)
        ),
        "--max-samples and --num-shards are mutually exclusive; sample in a single job": last and is_sampled,
        f"--dataset excludes {language_flag}, as the registry states each dataset's language; remove it": (
            args.dataset and language_flag != "--dataset"
        ),
        "--language must be original, expanded, kept, a code such as eu or eus_Latn, or one of --original-languages or "
        f"--expanded-languages, got {args.language}": (
            is_code and not is_language(args.language or "") and args.language not in listed
        ),
        f"--language {args.language} requires --original-languages or --expanded-languages, such as "
        f"--expanded-languages {args.language}": is_code and not named,
        f"{language_flag} requires --original-languages, such as --original-languages en,es,zh": (
            has_names and not named
        ),
        f"{language_flag} excludes --original-languages and --expanded-languages, which require --language CODE, "
        "--language-key, --spans-key or --detect-language": (
            not has_names and (args.original_languages or (args.expanded_languages and args.language != KEPT))
        ),
        "--undetected requires --detect-language": args.undetected and not args.detect_language,
        "--min-confidence requires --detect-language or --audit": (
            args.min_confidence is not None and not args.detect_language and not args.audit
        ),
        "--max-bad-share requires --on-error skip": args.max_bad_share is not None and args.on_error != "skip",
        "--audit and --detect-language are mutually exclusive: there are no stated languages to audit": (
            args.audit and args.detect_language
        ),
        "--spans-key and --json-keys are mutually exclusive; remove --json-keys": (
            args.spans_key and keys not in ([], ["text"])
        ),
        **_rules_for_conversations(args),
        f"--num-shards {args.num_shards} requires --shard, 0 to {last}": args.shard is None and last,
        f"--shard must be 0 to {last} (--num-shards {args.num_shards}), got {args.shard}": (
            args.shard is not None and not 0 <= args.shard <= last
        ),
    }
    for message, is_broken in rules.items():
        if is_broken:
            raise UserError(message)


def _rules_for_conversations(args: Settings) -> dict[str, Any]:
    given = args.chat_template_from is not None or args.max_tokens is not None
    if not args.conversations:
        return {"--chat-template-from and --max-tokens require --conversations": given}
    others = {
        "--dataset": args.dataset,
        "--spans-key": args.spans_key,
        "--detect-language line": args.detect_language == "line",
        "--append-eod": args.append_eod,
        "--tokenizer-backend gigatoken": args.tokenizer_backend == "gigatoken",
        "--tokenizer-type SentencePieceTokenizer": args.tokenizer_type == "SentencePieceTokenizer",
    }
    why = "the chat template ends turns and has all special tokens, and a conversation has one language"
    return {f"--conversations excludes {flag}: {why}": value for flag, value in others.items()}
