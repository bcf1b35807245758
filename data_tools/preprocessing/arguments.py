"""The command line of preprocess_data.py, and checks of options that exclude or require each other."""

import argparse
import os
from pathlib import Path

from data_tools.preprocessing.inputs import STANDARD_INPUT
from moelpr.data.tokenizer import add_tokenizer_arguments
from moelpr.errors import UserError

REGISTRY_FILE = "dataset_info.json"


def parse_arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: Options exclude or require each other.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input(parser)
    _add_output(parser)
    _add_tokenizer(parser)
    _add_languages(parser)
    _add_execution(parser)
    arguments = parser.parse_args(argv)
    _check_input(parser, arguments)
    _check_languages(parser, arguments)
    _check_values(arguments)
    return arguments


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input (files, or datasets of a registry)").add_argument
    add(
        "--input",
        nargs="+",
        metavar="FILE",
        help="JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet: files, folders, glob patterns, - for standard input",
    )
    add("--dataset", metavar="A,B", help="datasets of the registry, read in this order")
    add("--dataset-info", type=Path, metavar="FILE", help=f"the registry (default: {REGISTRY_FILE} in --dataset-dir)")
    add("--dataset-dir", type=Path, metavar="DIR", help="folder of the datasets' files (default: the registry's)")
    add("--json-keys", nargs="+", metavar="KEY", help="JSON text keys, one corpus per key (default: text)")
    add("--max-samples", type=int, metavar="N", help="documents to sample per dataset, or of --input (default: all)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output-prefix", required=True, metavar="P", help="write P_<key>_document.bin, .idx and .lang")
    add(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="X",
        help="fraction of the documents to write to P_validation_<key>_document instead, 0 to 1 (default: 0)",
    )
    add("--seed", type=int, default=1234, help="random seed of --max-samples and --validation-share (default: 1234)")
    add("--overwrite", action="store_true", help="replace an existing corpus")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = add_tokenizer_arguments(parser, required=True).add_argument
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--eod-token", metavar="TOKEN", help="that token, such as '<|endoftext|>' (default: the tokenizer's)")
    add(
        "--tokenizer-backend",
        choices=("auto", "reference", "gigatoken"),
        default="auto",
        help="reference: the tokenizer's own library; gigatoken: a faster one; auto: gigatoken if it is installed and "
        "gives the same IDs (default: auto)",
    )


def _add_languages(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("language bit (--input requires one of the first four; a registry states it)")
    add = group.add_argument
    add("--language", choices=("original", "expanded"), help="language group of all documents")
    add("--language-key", metavar="KEY", help="JSON key of a document's language")
    add(
        "--spans-key",
        metavar="KEY",
        help='JSON key of a document\'s spans, [{"text": …, "lang": …}, …]; a token has the language of the span that '
        "contains its first byte",
    )
    add(
        "--detect-language",
        nargs="?",
        const="document",
        choices=("document", "line"),
        help="detect the language with py3langid, per document (default) or per line",
    )
    add("--original-languages", metavar="A,B", help="languages whose bit is original")
    add(
        "--expanded-languages",
        metavar="C,D",
        help="expanded languages; any other is an error, and only named languages are detected (default: all others)",
    )
    add(
        "--min-confidence",
        type=float,
        default=0.5,
        metavar="X",
        help="confidence below which a detected language is uncertain, 0 to 1; an uncertain line has the language of "
        "its document (default: 0.5)",
    )
    add(
        "--undetected",
        choices=("expanded", "original", "skip"),
        default="expanded",
        help="how to tag documents of uncertain language (default: expanded, which the LPR loss ignores)",
    )
    add("--audit", action="store_true", help="detect languages too, and print them against the stated ones")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("execution").add_argument
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help=f"worker processes (default: one per core, {cores})")
    add("--num-shards", type=int, default=1, metavar="N", help="number of jobs that share the input (default: 1)")
    add("--shard", type=int, metavar="I", help="index of this job, 0 to N - 1; part of its files' names")
    add("--resume", action="store_true", help="resume an interrupted job, or start a new one")
    add("--log-interval", type=int, default=10_000, metavar="N", help="documents between log lines (default: 10000)")
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a malformed line, or skip it and list it in P.skipped.txt (default: stop)",
    )
    add(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="X",
        help="with --on-error skip, fail if more than this fraction of the lines is malformed (default: 0.01)",
    )
    add("--debug", action="store_true", help="show the traceback of an error")


def _check_input(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if bool(arguments.input) == bool(arguments.dataset):
        parser.error("pass exactly one of --input, --dataset")
    if arguments.dataset:
        if arguments.dataset_info is None and arguments.dataset_dir is None:
            raise UserError("--dataset requires --dataset-info, the registry, or --dataset-dir, its folder")
        if arguments.json_keys:
            raise UserError("--json-keys requires --input; a registry states the key of the text")
        arguments.dataset_info = arguments.dataset_info or arguments.dataset_dir / REGISTRY_FILE
        arguments.dataset_dir = arguments.dataset_dir or arguments.dataset_info.parent
    elif arguments.dataset_info or arguments.dataset_dir:
        raise UserError("--dataset-info and --dataset-dir require --dataset, the names of datasets")
    arguments.json_keys = arguments.json_keys or ["text"]
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        raise UserError(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    streams = (arguments.input or []).count(STANDARD_INPUT)
    if streams > 1:
        raise UserError("--input - (standard input) can be read only once")
    if streams and (arguments.num_shards > 1 or arguments.max_samples is not None):
        raise UserError("--input - (standard input) excludes --num-shards and --max-samples; write it to a file first")
    if arguments.max_samples is not None and arguments.num_shards > 1:
        raise UserError("--max-samples and --num-shards are mutually exclusive; sample in a single job")


def _check_languages(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    flags = ("--language", "--language-key", "--spans-key", "--detect-language")
    given = [flag for flag in flags if getattr(arguments, flag[2:].replace("-", "_"))]
    if arguments.input and len(given) != 1:
        parser.error(f"pass exactly one of {', '.join(flags)}")
    if arguments.dataset and given:
        raise UserError(f"--dataset excludes {given[0]}, as the registry states each dataset's language; remove it")
    flag = given[0] if given else "--dataset"
    has_names = flag not in ("--language", "--dataset")
    if has_names and not arguments.original_languages:
        raise UserError(f"{flag} requires --original-languages, such as --original-languages en,es,zh")
    if not has_names and (arguments.original_languages or arguments.expanded_languages):
        raise UserError(
            f"{flag} excludes --original-languages and --expanded-languages, which require --language-key, --spans-key "
            "or --detect-language"
        )
    if arguments.undetected != "expanded" and flag != "--detect-language":
        raise UserError("--undetected requires --detect-language")
    if arguments.audit and flag == "--detect-language":
        raise UserError("--audit and --detect-language are mutually exclusive: there are no stated languages to audit")
    if flag == "--spans-key" and arguments.json_keys != ["text"]:
        raise UserError("--spans-key and --json-keys are mutually exclusive; remove --json-keys")


def _check_values(arguments: argparse.Namespace) -> None:
    for flag in ("workers", "log_interval", "num_shards", "max_samples"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    for flag in ("validation_share", "max_bad_share", "min_confidence"):
        value = getattr(arguments, flag)
        if not 0 <= value <= 1:
            raise UserError(f"--{flag.replace('_', '-')} must be between 0 and 1, got {value}")
    if arguments.validation_share == 1:
        raise UserError("--validation-share must be below 1; nothing would be left to train on")
    if not 0 <= arguments.seed < 1 << 63:
        raise UserError(f"--seed must be at least 0 and below 2^63, got {arguments.seed}")
    last = arguments.num_shards - 1
    if arguments.shard is None and last:
        raise UserError(f"--num-shards {arguments.num_shards} requires --shard, 0 to {last}")
    if arguments.shard is not None and not 0 <= arguments.shard <= last:
        raise UserError(f"--shard must be 0 to {last} (--num-shards {arguments.num_shards}), got {arguments.shard}")
