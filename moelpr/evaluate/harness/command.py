"""python -m moelpr.evaluate harness: the paper's benchmarks, by lm-evaluation-harness."""

import argparse
from dataclasses import asdict
from pathlib import Path

from moelpr.errors import UserError
from moelpr.evaluate.arguments import add_device_arguments, named_paths, read_original


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.evaluate harness",
        description="Run lm-evaluation-harness on Hugging Face directories with the paper's tasks (ARC, MMLU, "
        "HellaSwag, Belebele, FLORES) at its shot counts, and average original and expanded languages as in its "
        "Table 1. Needs the extra `eval`. Data sets come from the Hugging Face hub, or offline (HF_HUB_OFFLINE=1) from "
        "its cache or from tasks of your own.",
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]DIR",
        help="Hugging Face directory; repeat it; the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--languages", required=True, metavar="en,el,...", help="codes as in the table of tasks")
    parser.add_argument(
        "--original-languages", required=True, metavar="en,...", help="the other --languages are expanded ones"
    )
    parser.add_argument(
        "--tasks", type=Path, metavar="FILE",
        help="table of benchmarks, shots and tasks as YAML (default: moelpr/evaluate/harness/paper_tasks.yaml)",
    )  # fmt: skip
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with the harness's task files of your own"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task, for a trial (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions (default: %(default)s)")
    add_device_arguments(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for results as JSON, Markdown and HTML; given again, it goes on where it stopped",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    models = named_paths(arguments.model, "--model", default_name=True)
    languages = [language.strip() for language in arguments.languages.split(",") if language.strip()]
    original = read_original(arguments.original_languages, dict.fromkeys(languages), "--languages")
    for flag, value in (("--limit", arguments.limit), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} leaves nothing to run; give at least 1")

    from moelpr.evaluate.harness.results import HarnessResults  # after the arguments: torch is slow
    from moelpr.evaluate.harness.run import HarnessSettings, run_tasks
    from moelpr.evaluate.harness.tasks import PAPER_TASKS, read_benchmarks
    from moelpr.evaluate.models import choose_device, read_max_positions
    from moelpr.evaluate.outputs import write_outputs
    from moelpr.evaluate.parts import Parts

    benchmarks = read_benchmarks(arguments.tasks or PAPER_TASKS, languages)
    choose_device(arguments.device)
    for directory in models.values():
        read_max_positions(directory)  # complains about what is no model
    settings = HarnessSettings(
        arguments.include_path, arguments.limit, arguments.batch_size, arguments.device, arguments.dtype
    )
    parts = Parts(arguments.output) if arguments.output else None
    scores = run_tasks(models, benchmarks, settings, parts)
    described = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    results = HarnessResults(models, benchmarks, languages, original, scores, described)
    print("\n\n".join(table.markdown_section() for table in results.tables()))
    print("\n" + "\n".join(results.findings()))
    if arguments.output:
        write_outputs(arguments.output, "harness", "Benchmarks", results)
