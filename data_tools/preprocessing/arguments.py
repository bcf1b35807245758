"""The flags of preprocess_data.py, and which of them contradict each other."""

import argparse
import os
from pathlib import Path

from data_tools.preprocessing.registry import REGISTRY_FILE
from data_tools.preprocessing.sources import STANDARD_INPUT
from moelpr.data.tokenizer import add_tokenizer_arguments
from moelpr.errors import UserError


def parse_arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: flags contradict each other.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input(parser)
    _add_output(parser)
    _add_tokenizer(parser)
    _add_languages(parser)
    _add_running(parser)
    arguments = parser.parse_args(argv)
    _check_input(parser, arguments)
    _check_languages(parser, arguments)
    _check_running(arguments)
    return arguments


def _add_input(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input (files, or datasets of a registry)")
    group.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet: files, folders, patterns, or - for standard input, "
        "read in this order",
    )
    group.add_argument("--dataset", metavar="A,B", help="datasets of the registry, read in this order")
    group.add_argument(
        "--dataset-info", type=Path, metavar="FILE", help=f"the registry (default: {REGISTRY_FILE} in --dataset-dir)"
    )
    group.add_argument(
        "--dataset-dir", type=Path, metavar="DIR", help="folder of the registry's files (default: the registry's own)"
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="keys of text, a corpus each (default: text); a registry names the key itself",
    )
    group.add_argument(
        "--max-samples",
        type=int,
        metavar="N",
        help="documents to draw from each dataset, or from all of --input (default: all); reads the files twice",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="P", help="write P_<key>_document.bin, .idx and .lang")
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the documents that go into P_validation_<key>_document instead, 0 to 1 (default: 0)",
    )
    group.add_argument("--seed", type=int, default=1234, help="of --max-samples and --validation-share (default: 1234)")
    group.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    group = add_tokenizer_arguments(parser, required=True)
    group.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    group.add_argument(
        "--eod-token", metavar="TOKEN", help="that token, such as '<|endoftext|>' (default: the tokenizer's own)"
    )
    group.add_argument(
        "--tokenizer-backend",
        choices=("auto", "reference", "gigatoken"),
        default="auto",
        help="gigatoken where it is installed and gives the same ids, or the tokenizer's own library (default: auto)",
    )


def _add_languages(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("language bit (with --input one of the first four; a registry states it itself)")
    group.add_argument("--language", choices=("original", "expanded"), help="what all of the input is")
    group.add_argument("--language-key", metavar="KEY", help="key that holds a document's language")
    group.add_argument(
        "--spans-key",
        metavar="KEY",
        help='key that holds a document as a list of spans, [{"text": …, "lang": …}, …]; a token takes the language of '
        "the span that holds its first byte",
    )
    group.add_argument(
        "--detect-language",
        nargs="?",
        const="document",
        choices=("document", "line"),
        help="find it with py3langid, for each document (the default) or each line of one",
    )
    group.add_argument("--original-languages", metavar="A,B", help="languages whose bit is original")
    group.add_argument(
        "--expanded-languages",
        metavar="C,D",
        help="expanded languages; any other is an error, and none other is detected (default: all others are)",
    )
    group.add_argument(
        "--min-confidence",
        type=float,
        default=0.5,
        metavar="X",
        help="below this, 0 to 1, a detected language is uncertain; a line then takes its document's (default: 0.5)",
    )
    group.add_argument(
        "--undetected",
        choices=("expanded", "original", "skip"),
        default="expanded",
        help="what a document of uncertain language is (default: expanded, which the LPR loss leaves alone)",
    )
    group.add_argument(
        "--audit", action="store_true", help="compare the languages stated with those py3langid detects, and report"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    cores = len(os.sched_getaffinity(0))
    group.add_argument("--workers", type=int, default=cores, help=f"processes (default: one per core, {cores} here)")
    group.add_argument("--num-shards", type=int, default=1, metavar="N", help="jobs that share the input (default: 1)")
    group.add_argument("--shard", type=int, metavar="I", help="which of the N this one is, from 0; its files end in it")
    group.add_argument(
        "--resume", action="store_true", help="go on where a job was interrupted, or start if there is none"
    )
    group.add_argument(
        "--log-interval", type=int, default=10_000, help="documents between two lines of a log (default: 10000)"
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="on a broken line, stop, or skip it and list it in P.skipped.txt (default: stop)",
    )
    group.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="X",
        help="with --on-error skip, stop in the end if more than this share of the lines was broken (default: 0.01)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _check_input(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if bool(arguments.input) == bool(arguments.dataset):
        parser.error("one of --input and --dataset is wanted")
    if arguments.dataset:
        if arguments.dataset_info is None and arguments.dataset_dir is None:
            raise UserError("--dataset needs --dataset-info, the registry, or --dataset-dir, its folder")
        if arguments.json_keys:
            raise UserError("--json-keys is for --input; a registry names the key of the text itself")
        if arguments.dataset_info is None:
            arguments.dataset_info = arguments.dataset_dir / REGISTRY_FILE
        if arguments.dataset_dir is None:
            arguments.dataset_dir = arguments.dataset_info.parent
    elif arguments.dataset_info or arguments.dataset_dir:
        raise UserError("--dataset-info and --dataset-dir need --dataset, the names of datasets")
    arguments.json_keys = arguments.json_keys or ["text"]
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        raise UserError(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    streams = (arguments.input or []).count(STANDARD_INPUT)
    if streams > 1:
        raise UserError("standard input (-) can be read only once")
    if streams and (arguments.num_shards > 1 or arguments.max_samples is not None):
        raise UserError("standard input can be neither shared by several jobs nor drawn from; put it into a file")
    if arguments.max_samples is not None and arguments.num_shards > 1:
        raise UserError("--max-samples and --num-shards exclude each other; what is drawn is little, one job does it")


def _check_languages(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    ways = [
        flag
        for flag in ("--language", "--language-key", "--spans-key", "--detect-language")
        if getattr(arguments, flag[2:].replace("-", "_"))
    ]
    if arguments.input and len(ways) != 1:
        parser.error("one of --language, --language-key, --spans-key and --detect-language is wanted")
    if arguments.dataset and ways:
        raise UserError(f"the registry states each dataset's language; leave {ways[0]} out")
    way = ways[0] if ways else "--dataset"
    names_languages = way not in ("--language", "--dataset")
    if names_languages and not arguments.original_languages:
        raise UserError(f"{way} needs --original-languages, such as --original-languages en,es,zh")
    if not names_languages and arguments.original_languages:
        raise UserError(
            f"--original-languages and --expanded-languages need --language-key or the like; {way} tags all"
        )
    if not names_languages and arguments.expanded_languages:
        raise UserError(
            f"--original-languages and --expanded-languages need --language-key or the like; {way} tags all"
        )
    if arguments.undetected != "expanded" and way != "--detect-language":
        raise UserError("--undetected needs --detect-language")
    if arguments.audit and way == "--detect-language":
        raise UserError("--audit compares stated languages with detected ones; --detect-language states none")
    if way == "--spans-key" and arguments.json_keys != ["text"]:
        raise UserError("--spans-key makes one corpus, named after the spans' text; leave --json-keys out")


def _check_running(arguments: argparse.Namespace) -> None:
    for flag in ("workers", "log_interval", "num_shards", "max_samples"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    for flag in ("validation_share", "max_bad_share", "min_confidence"):
        value = getattr(arguments, flag)
        if not 0 <= value <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be between 0 and 1")
    if arguments.validation_share == 1:
        raise UserError("--validation-share 1 leaves nothing to train on")
    if not 0 <= arguments.seed < 1 << 63:
        raise UserError(f"--seed {arguments.seed} must be between 0 and 2^63")
    if arguments.shard is None and arguments.num_shards > 1:
        raise UserError(f"--num-shards {arguments.num_shards} needs --shard, 0 to {arguments.num_shards - 1}")
    if arguments.shard is not None and not 0 <= arguments.shard < arguments.num_shards:
        raise UserError(f"--shard {arguments.shard} is none of the --num-shards {arguments.num_shards}, counted from 0")
