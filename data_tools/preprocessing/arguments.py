"""The command line of moelpr data preprocess, and checks of options that exclude or require each other."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from moelpr.base.command import CommandParser
from moelpr.base.errors import UserError
from moelpr.base.languages import is_code as is_language
from moelpr.base.machine import available_cpus
from moelpr.data.text.sources import STANDARD_INPUT
from moelpr.data.tokenizers.loading import TOKENIZER_TYPES

REGISTRY_FILE = "dataset_info.json"
# Defaults of options that require others; _check must see them as they were passed.
_DEFAULTS = {"min_confidence": 0.5, "undetected": "expanded", "max_bad_share": 0.01}
_WORKERS_PER_CPU = 8
_COUNT: dict[str, Any] = {"type": int, "metavar": "N"}
_FRACTION: dict[str, Any] = {"type": float, "metavar": "X"}
KEPT = "kept"  # text like no replay and no expanded language, whose bit is original
GROUPS = ("original", "expanded", KEPT)
_LANGUAGE_FLAGS = ("--language", "--language-key", "--spans-key", "--detect-language")


def parse_arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=description)
    group = parser.add_argument_group("input (files, or datasets of a registry)")
    add, add_source = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    files = "JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet: files, folders, patterns, URIs (hf://, s3://, gs://, "
    files += "https://), - for standard input"
    add_source("--input", nargs="+", metavar="FILE", help=files)
    add_source("--dataset", metavar="A,B", help="datasets of the registry, read in this order")
    add("--dataset-info", type=Path, metavar="FILE", help=f"the registry (default: {REGISTRY_FILE} in --dataset-dir)")
    add("--dataset-dir", type=Path, metavar="DIR", help="folder of the datasets' files (default: the registry's)")
    keys = "JSON text keys, one corpus per key (default: text, or messages with --conversations)"
    add("--json-keys", nargs="+", metavar="KEY", help=keys)
    which = "keep documents by their keys or columns: comparisons, and, or, not, in [...], is_null(key), such as "
    which += "'language_score >= 0.9'"
    add("--filter", metavar="CONDITION", help=which)
    some = "random documents from each --dataset or from all of --input, before --filter (default: all)"
    add("--max-samples", **_COUNT, help=some)

    add = parser.add_argument_group("conversations (docs/chat.md)").add_argument
    what = 'documents are conversations, [{"role": …, "content": …}, …]; only assistant turns count in the loss'
    add("--conversations", action="store_true", help=what)
    template = "folder of the chat model whose chat template to use, or a file with one (default: --tokenizer-model)"
    add("--chat-template-from", metavar="PATH", help=template)
    longest = "longest conversation, the --seq-length of training; a longer one is a malformed line (default: any)"
    add("--max-tokens", **_COUNT, help=longest)

    add = parser.add_argument_group("output").add_argument
    add("--output-prefix", required=True, metavar="P", help="write P_<key>_document.bin, .idx and .lang")
    share = "fraction of the documents, 0 to 1, to write to P_validation_<key>_document instead, and their text to "
    share += "P_validation.jsonl (default: 0)"
    add("--validation-share", **_FRACTION, default=0.0, help=share)
    add("--seed", **_COUNT, default=1234, help="seed of --max-samples and --validation-share (default: 1234)")
    add("--overwrite", action="store_true", help="replace an existing corpus")

    add = add_tokenizer_arguments(parser, required=True).add_argument
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--eod-token", metavar="TOKEN", help="that token, such as '<|endoftext|>' (default: the tokenizer's)")
    libraries = "reference: the tokenizer's own library; gigatoken: a faster one; auto: gigatoken if it is installed "
    libraries += "and gives the same IDs (default: auto)"
    add("--tokenizer-backend", choices=("auto", "reference", "gigatoken"), default="auto", help=libraries)

    group = parser.add_argument_group("language bit (--input requires one of the first four; a registry states it)")
    add, add_language = group.add_argument, group.add_mutually_exclusive_group().add_argument
    one = "language of all documents, such as eu with --expanded-languages eu; or their group: original, expanded, or "
    one += "kept: other text that original experts should go on with (with --expanded-languages, it is checked)"
    add_language("--language", metavar="CODE", help=one)
    add_language("--language-key", metavar="KEY", help="JSON key of a document's language")
    spans = 'JSON key of a document\'s spans, [{"text": …, "lang": …}, …]; a token has the language of its first byte'
    add_language("--spans-key", metavar="KEY", help=spans)
    units = ("document", "line")
    detect = "detect the language with py3langid, per document (default) or per line"
    add_language("--detect-language", nargs="?", const="document", choices=units, help=detect)
    add("--original-languages", metavar="A,B", help="languages whose bit is original")
    expanded = "expanded languages; any other is an error, and only named ones are detected (default: all others)"
    add("--expanded-languages", metavar="C,D", help=expanded)
    confidence = "confidence, 0 to 1, below which a detected language is uncertain; an uncertain line has the language "
    confidence += "of its document (default: 0.5)"
    add("--min-confidence", **_FRACTION, help=confidence)
    undetected = "tag of documents of uncertain language (default: expanded, which the LPR loss ignores)"
    add("--undetected", choices=("expanded", "original", "skip"), help=undetected)
    add("--audit", action="store_true", help="detect languages too, and print them against the stated ones")

    add = parser.add_argument_group("execution").add_argument
    cores = available_cpus()
    add("--workers", **_COUNT, default=cores, help=f"worker processes (default: one per core, {cores})")
    add("--num-shards", **_COUNT, default=1, help="number of jobs that share the input (default: 1)")
    add("--shard", type=int, metavar="I", help="index of this job, 0 to N - 1; part of its files' names")
    add("--resume", action="store_true", help="resume an interrupted job, or start a new one")
    add("--log-interval", **_COUNT, default=10_000, help="documents between log lines (default: 10000)")
    skip = "stop at a malformed line, or skip it and list it in P.skipped.txt (default: stop)"
    add("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    fail = "with --on-error skip, fail if more than this fraction of the lines is malformed (default: 0.01)"
    add("--max-bad-share", **_FRACTION, help=fail)

    arguments = parser.parse_args(argv)
    flag = next((flag for flag in _LANGUAGE_FLAGS if getattr(arguments, _name(flag))), None)
    if arguments.input and flag is None:
        parser.error(f"--input requires one of {', '.join(_LANGUAGE_FLAGS)}")
    _check(arguments, flag or "--dataset")
    if arguments.dataset:
        arguments.dataset_info = arguments.dataset_info or arguments.dataset_dir / REGISTRY_FILE
        arguments.dataset_dir = arguments.dataset_dir or arguments.dataset_info.parent
    for name, default in (_DEFAULTS | {"json_keys": ["messages" if arguments.conversations else "text"]}).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    arguments.audit |= arguments.language == KEPT and bool(arguments.expanded_languages)
    return arguments


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool) -> argparse._ArgumentGroup:
    """Add the tokenizer flags, with Megatron's names and meaning, and return their group."""
    group = parser.add_argument_group("tokenizer")
    add = group.add_argument
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=required, help="tokenizer library")
    paths = "a folder with tokenizer.json (HuggingFaceTokenizer) or a .model file (SentencePieceTokenizer)"
    add("--tokenizer-model", metavar="PATH", required=required, help=paths)
    omit = "omit the special tokens that a Hugging Face tokenizer adds around every text (default: keep them, as "
    omit += "Megatron does; Qwen's tokenizers add none)"
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help=omit)
    return group


def _name(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _check(args: argparse.Namespace, language_flag: str) -> None:
    """Raise an error if options exclude or require each other, or have values out of range."""
    for flag in ("--workers", "--log-interval", "--num-shards", "--max-samples", "--max-tokens"):
        if (value := getattr(args, _name(flag))) is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    cpus = available_cpus()
    if args.workers > (most := _WORKERS_PER_CPU * cpus):
        raise UserError(
            f"--workers must be at most {most}, {_WORKERS_PER_CPU} per CPU of the {cpus} available, got "
            f"{args.workers}; use {cpus}, because more are not faster, and each needs memory"
        )
    for flag in ("--validation-share", "--max-bad-share", "--min-confidence"):
        if (value := getattr(args, _name(flag))) is not None and not 0 <= value <= 1:
            raise UserError(f"{flag} must be between 0 and 1, got {value}")
    is_code = language_flag == "--language" and args.language not in GROUPS
    has_names = is_code or language_flag not in ("--language", "--dataset")
    named = args.original_languages or (is_code and args.expanded_languages)
    listed = f"{args.original_languages},{args.expanded_languages}".split(",")
    keys, last, is_sampled = args.json_keys or [], args.num_shards - 1, args.max_samples is not None
    streams = (args.input or []).count(STANDARD_INPUT)
    registry = args.dataset_info or args.dataset_dir
    rules = {
        "--dataset requires --dataset-info, the registry, or --dataset-dir, its folder": args.dataset and not registry,
        "--dataset-info and --dataset-dir require --dataset, the names of datasets": registry and not args.dataset,
        "--json-keys requires --input; a registry states the key of the text": args.dataset and keys,
        f"--json-keys {' '.join(keys)} names a key twice": len(set(keys)) < len(keys),
        f"--output-prefix must end in a file name, such as data/el, got {args.output_prefix!r}": (
            os.path.basename(args.output_prefix) in ("", ".", "..")
        ),
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
            is_code and not is_language(args.language) and args.language not in listed
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
        "--validation-share must be below 1; nothing would be left to train on": args.validation_share == 1,
        f"--seed must be at least 0 and below 2^63, got {args.seed}": not 0 <= args.seed < 1 << 63,
        f"--num-shards {args.num_shards} requires --shard, 0 to {last}": args.shard is None and last,
        f"--shard must be 0 to {last} (--num-shards {args.num_shards}), got {args.shard}": (
            args.shard is not None and not 0 <= args.shard <= last
        ),
    }
    for message, is_broken in rules.items():
        if is_broken:
            raise UserError(message)


def _rules_for_conversations(args: argparse.Namespace) -> dict[str, Any]:
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
