"""Measure what a model has learned: bits per byte, routing, and scores on benchmarks."""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moelpr.base.errors import UserError
from moelpr.base.settings import REPEATED, Count, File, Folder, Natural, metavar, number
from moelpr.data.text.reading import read_documents
from moelpr.measure.evaluate.settings import DeviceFlags, Languages, ReadingFlags, Source, named_paths
from moelpr.model.families.hf_config import check_model

if TYPE_CHECKING:
    from moelpr.measure.evaluate.compare import Comparison
    from moelpr.measure.evaluate.results import Results


class ModelFlags(DeviceFlags):
    """models"""

    # Hugging Face directory, checkpoint folder or .gguf file; repeat for several; the first is the reference
    model: Annotated[list[str], REPEATED, metavar("[NAME=]DIR")]
    output: Folder | None = None  # folder for results and figures; rerun the command to resume

    def models(self) -> dict[str, Path]:
        models = {name: Path(path) for name, path in named_paths(self.model, "--model").items()}
        for path in models.values():
            check_model(path)
        return models


class HeldOutFlags(ReadingFlags, ModelFlags):
    """held-out text"""

    # JSON lines or Parquet, a file, folder or pattern; repeat for several
    data: Annotated[list[str], REPEATED, metavar("LANG=FILE")]
    # languages of --data that the base supports; all others are expanded languages (default: unknown)
    original_languages: Languages = []

    def __post_init__(self) -> None:
        self.models()
        check_languages(self.original_languages, self.texts(), "--data")

    def texts(self) -> dict[str, str]:
        return named_paths(self.data, "--data")

    def documents(self) -> dict[str, list[str]]:
        """The texts by language, to be read before torch is imported."""
        texts = self.texts().items()
        return {language: read_documents(path, self.json_key, self.max_documents) for language, path in texts}


class Text(HeldOutFlags):
    seed: Natural = 1  # random seed of the bootstrap
    base: Source | None = None  # also measure KL(base‖model) in nats per token of the others; both are in memory
    continuations: Natural = 0  # also continue documents greedily by N tokens, to count those in another language
    prompts: Count = 20  # documents per language that are continued; the first is shown
    # py3langid, a fastText model's file, or none (default: py3langid if it is installed)
    language_id: str | None = None


class Routing(HeldOutFlags):
    # a layer breaks the prior if more of a language's first choices are wrong
    threshold: Annotated[float, number(float, 0, below=1)] = 0.5


class Harness(ModelFlags):
    # Hugging Face directory; repeat for several; the first is the reference
    model: Annotated[list[str], REPEATED, metavar("[NAME=]DIR")]
    languages: Languages  # language codes of --tasks
    original_languages: Languages  # all other --languages are expanded languages
    preset: Literal["paper", "all"] | None = None  # the paper's tasks (default), or all that lm-eval has for a language
    tasks: File | None = None  # YAML table of benchmarks, shots and tasks (default: paper_tasks.yaml)
    include_path: Folder | None = None  # folder with your own task files
    limit: Count | None = None  # examples per task (default: all)
    batch_size: Count = 8  # examples per batch
    num_processes: Count = 1  # processes that share the tasks, each with a GPU of its own if there are any

    def __post_init__(self) -> None:
        check_languages(self.original_languages, self.languages, "--languages")
        if self.preset and self.tasks:
            raise UserError("--preset and --tasks both name the tasks; pass one of them")
        if self.include_path and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path} is not a folder; pass one with task files")


def text(args: Text) -> None:
    """Measure bits per byte (lower is better), perplexity and next-token accuracy per model and language.

        moelpr evaluate --model base=DIR --model stage2=DIR --data en=en.jsonl --data el=el.jsonl

    The results have 95% confidence intervals, and the changes from the first model. `text` may be left out; `moelpr
    evaluate routing` and `moelpr evaluate harness` measure routing and benchmarks.
    """
    documents = args.documents()
    from moelpr.data.text.language_id import PY3LANGID, load_identifier
    from moelpr.measure.evaluate.wrong_language import MIN_CONFIDENCE

    identifier = None
    name = args.language_id or (PY3LANGID if find_spec(PY3LANGID) else "none")
    if args.continuations and name != "none":
        identifier = load_identifier(name, frozenset(), MIN_CONFIDENCE)
    from moelpr.measure.evaluate.text_results import TextResults  # only now, as it imports torch

    more = {"base": args.base, "continuation_tokens": args.continuations, "num_prompts": args.prompts}
    comparison = compare(args, documents, **more)
    show(TextResults(comparison, args.texts(), args.original_languages, args.seed, identifier), args.output, args.json)


def routing(args: Routing) -> None:
    """Show how MoE models route held-out text, per layer, expert and language.

        moelpr evaluate routing --model stage2=DIR --data en=en.jsonl --data el=el.jsonl --original-languages en

    The forward pass gives first choices, mean scores, entropy, load imbalance, and how often an original expert is
    among the top K. With --original-languages, the layers that break the language prior are listed. In the output
    folder of `moelpr evaluate`, nothing is measured twice.
    """
    documents = args.documents()
    from moelpr.measure.evaluate.routing_results import RoutingResults

    results = RoutingResults(compare(args, documents), args.texts(), args.original_languages, args.threshold)
    show(results, args.output, args.json)


def compare(args: HeldOutFlags, documents: dict[str, list[str]], **options: Any) -> "Comparison":
    """Measure all that held-out text shows."""
    from moelpr.measure.evaluate.compare import compare_models
    from moelpr.measure.evaluate.result_cache import ResultCache

    return compare_models(
        args.models(),
        documents,
        args.windows(),
        device=args.device,
        dtype=args.dtype,
        verify=args.verify,
        cache=ResultCache(args.output),
        **options,
    )


def harness(args: Harness) -> None:
    """Run lm-evaluation-harness with the paper's tasks and shot counts, and average as in its Table 1.

        moelpr evaluate harness --model base=DIR --model stage2=DIR --languages en,el --original-languages en

    The tasks are ARC, MMLU, HellaSwag, Belebele and FLORES. Requires the extra `eval`. Data sets come from the Hugging
    Face hub, or offline (HF_HUB_OFFLINE=1) from its cache or from your own tasks.
    """
    models = args.models()
    for path in models.values():
        check_model(path, is_hf=True)
    from moelpr.measure.evaluate.benchmarks import PAPER_TASKS, harness_version, installed_benchmarks, read_benchmarks

    is_all = args.preset == "all"
    benchmarks = (
        installed_benchmarks(args.languages) if is_all else read_benchmarks(args.tasks or PAPER_TASKS, args.languages)
    )
    harness_version()  # raises an error if lm_eval is missing
    from moelpr.measure.evaluate.harness import run_tasks  # only now, as it imports torch
    from moelpr.measure.evaluate.harness_results import HarnessResults
    from moelpr.measure.evaluate.result_cache import ResultCache

    settings = {name: getattr(args, name) for name in ("include_path", "limit", "batch_size", "device", "dtype")}
    scores = run_tasks(models, benchmarks, ResultCache(args.output), settings, args.verify, args.num_processes)
    show(HarnessResults(models, benchmarks, args.languages, args.original_languages, scores, settings), args.output)


def show(results: "Results", output: Path | None, as_json: bool = False) -> None:
    if output:
        results.write(output)  # first: the reader of a pipe may end
    if as_json:
        print(results.json_text())
    else:
        results.print()


def check_languages(original: list[str], languages: Collection[str], flag: str) -> None:
    if unknown := [language for language in original if language not in languages]:
        raise UserError(f"--original-languages {','.join(unknown)} must be among {flag} ({', '.join(languages)})")
