"""Put a finished demo's numbers into README.md and docs/results.md, and its picture into docs/images/demo.svg.

python examples/readme_results.py --run runs/demo
"""

import argparse
import shutil
from pathlib import Path

from moelpr.errors import UserError, run_command
from moelpr.files import atomic_file
from moelpr.report.demo import Report, failures, percent, read_report

TABLE, PAPER = "demo-table", "demo-and-paper"  # names of what stands between two marks
ROOT = Path(__file__).resolve().parent.parent
# The paper's Table 1 and its ablation without review (stage1): means over benchmarks, Qwen1.5-1.8B.
PAPER_SCORES = {
    "base": {"expanded": 34.36, "original": 53.97},
    "full_finetune": {"expanded": 41.12, "original": 49.73},
    "stage1": {"expanded": 45.04, "original": 47.14},
    "stage2": {"expanded": 45.07, "original": 52.12},
}
COLUMNS = {
    "base": "base",
    "full_finetune": "full fine-tuning",
    "stage1": "MoE-LPR, stage 1",
    "stage2": "MoE-LPR, stage 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    report = read_report(args.run)
    replace_between(ROOT / "README.md", TABLE, results(report))
    replace_between(ROOT / "docs" / "results.md", TABLE, results(report))
    replace_between(ROOT / "docs" / "results.md", PAPER, beside_the_paper(report))
    shutil.copy(args.run / "headline.svg", ROOT / "docs" / "images" / "demo.svg")


def replace_between(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- name:start --> and <!-- name:end -->."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(start) != 1 or content.count(end) != 1:
        raise UserError(f"{path} lacks the lines {start} and {end} that the demo's numbers go between; add them")
    before, after = content.split(start)[0], content.split(end)[1]
    with atomic_file(path) as temporary:
        temporary.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def results(report: Report) -> str:
    """Markdown: bits per byte of each model and language with the change against base, then what is not shown."""
    lines = [
        f"| bits per byte, held-out text | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for language, group in report.languages.items():
        base = report.bits("base", language)
        cells = [f"{base:.3f}"]
        for model in list(COLUMNS)[1:]:
            bits = report.bits(model, language)
            cells.append(f"{bits:.3f} ({percent(bits / base - 1)})")
        lines.append(f"| {language}, {group} | {' | '.join(cells)} |")
    checks = ", ".join(f"{name} {value:.2g}" for name, value in report.checks.items())
    minutes = sum(report.wall_times_s.values()) / 60
    lines += ["", f"Checks: {checks}. Wall time: {minutes:.0f} minutes on 2 cores.", ""]
    missed = failures(report)
    if missed:
        lines += ["Not shown by this run:", "", *(f"- {sentence}" for sentence in missed)]
    else:
        lines.append("Every line that the report promises is shown by this run.")
    return "\n".join(lines)


def beside_the_paper(report: Report) -> str:
    """Markdown: what the demo's bits per byte and the paper's scores have in common, shares without a unit."""

    def change(model: str, group: str) -> float:
        """Mean over the languages of a group of the relative change against base."""
        languages = report.group(group)
        return sum(report.bits(model, name) / report.bits("base", name) - 1 for name in languages) / len(languages)

    def gain(model: str, group: str) -> float:
        """The paper's points above base."""
        return PAPER_SCORES[model][group] - PAPER_SCORES["base"][group]

    rows = {
        "stage 1's forgetting that review repairs, original languages": (
            1 - change("stage2", "original") / change("stage1", "original"),
            1 - gain("stage2", "original") / gain("stage1", "original"),
        ),
        "stage 1's learning that is left after review, expanded languages": (
            change("stage2", "expanded") / change("stage1", "expanded"),
            gain("stage2", "expanded") / gain("stage1", "expanded"),
        ),
        "forgetting after both stages, as a share of full fine-tuning's": (
            change("stage2", "original") / change("full_finetune", "original"),
            gain("stage2", "original") / gain("full_finetune", "original"),
        ),
        "learning after both stages, as a share of full fine-tuning's": (
            change("stage2", "expanded") / change("full_finetune", "expanded"),
            gain("stage2", "expanded") / gain("full_finetune", "expanded"),
        ),
    }
    lines = ["| | demo, bits per byte | paper, benchmark scores |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {ours:.0%} | {theirs:.0%} |" for name, (ours, theirs) in rows.items())])


if __name__ == "__main__":
    run_command(main)
