"""python -m moelpr.evaluate: how well models predict held-out text, language by language, side by side."""

import argparse

from moelpr.evaluate.arguments import add_text_arguments, read_text_job


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.evaluate",
        description="Bits per byte (fewer is better), perplexity and next-token accuracy of models per language, with "
        "95 % intervals, and how far each model is from the first.",
        epilog="Further commands, each with --help: `routing` maps where tokens go; `harness` runs "
        "lm-evaluation-harness on the paper's tasks.",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=1, help="of the documents drawn for intervals (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    job = read_text_job(arguments)

    from moelpr.evaluate.measure import measure  # after the arguments: torch is slow
    from moelpr.evaluate.outputs import write_outputs
    from moelpr.evaluate.text_results import TextResults

    results = TextResults(job, measure(job), arguments.seed)
    print("\n\n".join(table.markdown_section() for table in results.tables()))
    if arguments.output:
        write_outputs(arguments.output, "results", "Held-out text", results)
