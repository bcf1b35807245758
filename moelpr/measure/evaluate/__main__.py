"""Measure what a model has learned: bits per byte, routing, and scores on benchmarks.

moelpr evaluate --model base=DIR --model stage2=DIR --data en=en.jsonl --data el=el.jsonl
moelpr evaluate routing --model stage2=DIR --data en=en.jsonl --data el=el.jsonl --original-languages en
moelpr evaluate harness --model base=DIR --model stage2=DIR --languages en,el --original-languages en
"""

import argparse
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moelpr.base.command import CommandParser, program_name, run_command
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.measure.evaluate.arguments import at_least, computing_arguments, named_paths, reading_arguments

if TYPE_CHECKING:
    from moelpr.measure.evaluate.results import Results


_TEXT = """Bits per byte (lower is better), perplexity and next-token accuracy per model and language, with 95%
confidence intervals, and the changes from the first model."""
_ROUTING = """Routing of MoE models per layer, expert and language, from their forward pass on held-out text: first
choices, mean scores, entropy, load imbalance, and how often an original expert is among the top K. With
--original-languages, the layers that break the language prior are listed. In the output folder of `moelpr
evaluate`, nothing is measured twice."""
_HARNESS = """Run lm-evaluation-harness with the paper's tasks (ARC, MMLU, HellaSwag, Belebele, FLORES) and shot counts,
and average original and expanded languages as in its Table 1. Requires the extra `eval`. Data sets come from the
Hugging Face hub, or offline (HF_HUB_OFFLINE=1) from its cache or from your own tasks."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["text", *arguments]  # the default command
    args = make_parser().parse_args(arguments)
    results: Results = args.measure(args)
    if args.output:
        results.write(args.output)  # first: the reader of a pipe may end
    if args.json:
        print(results.json_text())
    else:
        results.print()


def measure_text(args: argparse.Namespace) -> "Results":
    """Measure for the commands `text` and `routing`, which share all measurements."""
    models, data = named_models(args.model), named_paths(args.data, "--data")
    check_languages(args.original_languages, data, "--data")
    from moelpr.data.text.language_id import PY3LANGID, load_identifier
    from moelpr.data.text.reading import read_documents  # after the arguments: torch and matplotlib are slow to import
    from moelpr.measure.evaluate.compare import compare_models
    from moelpr.measure.evaluate.models import check_device
    from moelpr.measure.evaluate.result_cache import ResultCache
    from moelpr.measure.evaluate.routing_results import RoutingResults
    from moelpr.measure.evaluate.scoring import Settings
    from moelpr.measure.evaluate.text_results import TextResults
    from moelpr.measure.evaluate.wrong_language import MIN_CONFIDENCE

    check_device(args.device)
    identifier = None
    name = args.language_id or (PY3LANGID if find_spec(PY3LANGID) else "none")
    if args.continuations and name != "none":
        identifier = load_identifier(name, frozenset(), MIN_CONFIDENCE)
    cache = ResultCache(args.output)
    comparison = compare_models(
        models,
        {language: read_documents(path, args.json_key, args.max_documents) for language, path in data.items()},
        Settings(args.sequence_length, args.context, args.batch_size, args.skip_tokens),
        base=args.base,
        continuation_tokens=args.continuations,
        num_prompts=args.prompts,
        device=args.device,
        dtype=args.dtype,
        verify=args.verify,
        cache=cache,
    )
    if args.command == "routing":
        return RoutingResults(comparison, data, args.original_languages, args.threshold)
    return TextResults(comparison, data, args.original_languages, args.seed, identifier)


def measure_harness(args: argparse.Namespace) -> "Results":
    models = named_models(args.model)
    check_languages(args.original_languages, args.languages, "--languages")
    from moelpr.measure.evaluate.benchmarks import PAPER_TASKS, installed_benchmarks, read_benchmarks
    from moelpr.measure.evaluate.harness import run_tasks
    from moelpr.measure.evaluate.harness_results import HarnessResults
    from moelpr.measure.evaluate.models import check_device, read_max_positions
    from moelpr.measure.evaluate.result_cache import ResultCache

    if args.preset and args.tasks:
        raise UserError("--preset and --tasks both name the tasks; pass one of them")
    is_all = args.preset == "all"
    benchmarks = (
        installed_benchmarks(args.languages) if is_all else read_benchmarks(args.tasks or PAPER_TASKS, args.languages)
    )
    check_device(args.device)
    for directory in models.values():
        read_max_positions(directory)  # raises if it is not a model
    settings = {name: getattr(args, name) for name in ("include_path", "limit", "batch_size", "device", "dtype")}
    scores = run_tasks(models, benchmarks, ResultCache(args.output), settings, args.verify, args.num_processes)
    return HarnessResults(models, benchmarks, args.languages, args.original_languages, scores, settings)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog=program_name("python -m moelpr.measure.evaluate"),
        description=__doc__,
        epilog="`text` is the default command. `%(prog)s COMMAND --help` lists a command's options.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    text = commands.add_parser(
        "text", parents=[text_arguments()], help="bits per byte on held-out text (default)", description=_TEXT
    )
    add = text.add_argument
    add("--seed", type=at_least(0), default=1, metavar="N", help="random seed of the bootstrap (default: %(default)s)")
    what = (
        "also measure the distance of each other model from this one: KL(base‖model) in nats per token, exactly; both "
    )
    what += "are in memory, and read the same tokens"
    add("--base", type=Path, metavar="DIR", help=what)
    what = (
        "also continue the first words of documents, greedily, by up to TOKENS tokens, and measure how often "
        "in another language (default: %(default)s, none; Hugging Face directories only)"
    )
    add("--continuations", type=at_least(0), default=0, metavar="TOKENS", help=what)
    what = "documents per language that are continued; the first is shown (default: %(default)s)"
    add("--prompts", type=at_least(1), default=20, metavar="N", help=what)
    what = (
        "identify the languages of continuations by py3langid, by a fastText model such as GlotLID (its file), or not: "
        "none (default: py3langid if it is installed)"
    )
    add("--language-id", metavar="MODEL", help=what)

    routing = commands.add_parser(
        "routing", parents=[text_arguments()], help="where each language's tokens go", description=_ROUTING
    )
    routing.set_defaults(base=None, continuations=0, prompts=1, language_id=None)
    what = (
        "a layer breaks the prior if more than this fraction of a language's first choices is wrong (original "
        "languages: a new expert; expanded languages: an original one); at least 0, below 1 (default: %(default)s)"
    )
    routing.add_argument("--threshold", type=fraction, default=0.5, metavar="FRACTION", help=what)

    models = model_argument("Hugging Face directory; repeat for several; the first is the reference")
    harness = commands.add_parser(
        "harness",
        parents=[models, computing_arguments()],
        help="the paper's benchmarks, by lm-evaluation-harness",
        description=_HARNESS,
    )
    add = harness.add_argument
    add("--languages", type=languages, required=True, metavar="en,el,...", help="language codes of --tasks")
    what = "all other --languages are expanded languages"
    add("--original-languages", type=languages, required=True, metavar="en,...", help=what)
    what = (
        "tasks and numbers of examples: the paper's (default), or all: also XCOPA, XStoryCloze, XNLI, XWinograd, "
        "PAWS-X, TruthfulQA and PIQA, as far as the installed lm-eval has them for a language"
    )
    add("--preset", choices=("paper", "all"), help=what)
    what = "YAML table of benchmarks, shots and tasks (default: moelpr/measure/evaluate/paper_tasks.yaml)"
    add("--tasks", type=Path, metavar="FILE", help=what)
    add("--include-path", type=Path, metavar="DIR", help="folder with your own task files")
    add("--limit", type=at_least(1), metavar="N", help="examples per task (default: all)")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="examples per batch (default: %(default)s)")
    what = "processes that share the tasks, each with a GPU of its own if there are any (default: %(default)s)"
    add("--num-processes", type=at_least(1), default=1, metavar="N", help=what)
    harness.set_defaults(measure=measure_harness, json=False)  # lm_eval prints on stdout too
    return parser


def text_arguments() -> CommandParser:
    """The arguments of `text` and `routing`."""
    models = "Hugging Face directory, Megatron checkpoint folder or .gguf file (extra `gguf`); repeat for several; the "
    models += "first is the reference"
    parser = CommandParser(
        add_help=False, parents=[model_argument(models), computing_arguments(), reading_arguments("all")]
    )
    add = parser.add_argument
    what = "held-out text of a language: JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet, a file, folder or "
    what += "pattern; repeat for several"
    add("--data", action="append", required=True, metavar="LANG=FILE", help=what)
    what = "languages of --data that the base supports; all others are expanded languages (default: unknown)"
    add("--original-languages", type=languages, default=[], metavar="en,es,...", help=what)
    parser.set_defaults(measure=measure_text)
    return parser


def model_argument(models: str) -> CommandParser:
    """The argument --model, which `models` describes."""
    parser = CommandParser(add_help=False)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]DIR", help=models)
    return parser


def languages(value: str) -> list[str]:
    return [canonical(language.strip()) for language in value.split(",") if language.strip()]


def check_languages(original: list[str], languages: Collection[str], flag: str) -> None:
    if unknown := [language for language in original if language not in languages]:
        raise UserError(f"--original-languages {','.join(unknown)} must be among {flag} ({', '.join(languages)})")


def named_models(items: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, path in named_paths(items, "--model").items()}


def fraction(value: str) -> float:
    if not 0 <= float(value) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {value}")
    return float(value)


if __name__ == "__main__":
    run_command(main)
