"""python -m moelpr.evaluate routing: where each language's tokens go, layer by layer."""

import argparse

from moelpr.errors import UserError
from moelpr.evaluate.arguments import add_text_arguments, read_text_job


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.evaluate routing",
        description="Routing of MoE models per layer, expert and language, from their forward pass on held-out text: "
        "first choices, mean scores, entropy, load imbalance, and how often an original expert is among the top K. "
        "With --original-languages, the layers that break the language prior are named. In the output folder of "
        "`python -m moelpr.evaluate` nothing is measured twice.",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="SHARE",
        help="a layer breaks the prior where more than this share of a language's first choices goes the wrong way: "
        "original languages to new experts, expanded languages to original ones (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    job = read_text_job(arguments)
    if not 0 <= arguments.threshold < 1:
        raise UserError(f"--threshold {arguments.threshold} is no share; give 0 to 1, for example 0.5")

    from moelpr.evaluate.measure import measure  # after the arguments: torch is slow
    from moelpr.evaluate.outputs import write_outputs
    from moelpr.evaluate.routing_results import RoutingResults

    results = RoutingResults(job, measure(job), arguments.threshold)
    print("\n\n".join(table.markdown_section() for table in results.tables()))
    print("\n" + "\n".join(results.findings()))
    if arguments.output:
        write_outputs(arguments.output, "routing", "Routing", results)
