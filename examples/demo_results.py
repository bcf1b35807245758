"""Write the numbers and figures of a finished demo into docs/.

python -m examples.demo_results --run runs/demo
"""

import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.demo_claims import judge, read_checks
from examples.demo_tasks import ROOT
from moelpr.base import records
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.languages import language_name
from moelpr.measure.report.numbers import percent
from moelpr.measure.report.page import Table, markdown_table

# Names of the parts of the documents that are replaced.
TABLE, PAPER = "demo-table", "demo-and-paper"
MODELS = {"full_finetune": "full fine-tuning", "stage1": "MoE-LPR, stage 1", "stage2": "MoE-LPR, stage 2"}
# Means over benchmarks of Qwen1.5-1.8B: the paper's Table 1 and, for stage1, its ablation without review.
PAPER_SCORES = {
    "base": {"expanded": 34.36, "original": 53.97},
    "full_finetune": {"expanded": 41.12, "original": 49.73},
    "stage1": {"expanded": 45.04, "original": 47.14},
    "stage2": {"expanded": 45.07, "original": 52.12},
}
# Figure of docs/results-details.md or docs/evaluation.md -> figure of the evaluation.
FIGURES = {
    "demo": "change",
    "evaluation-change": "change",
    "evaluation-prior-stage1": "routing-stage1-original-first-share",
    "evaluation-prior-stage2": "routing-stage2-original-first-share",
    "evaluation-experts": "routing-stage2-experts",
    "evaluation-load": "routing-stage2-load-imbalance",
}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    args = parser.parse_args()
    report = records.read(dict[str, Any], args.run / "report.json", "run `make demo` first")
    page = ROOT / "docs" / "results-details.md"
    replace_between(page, TABLE, results(report, read_checks(args.run)))
    replace_between(page, PAPER, compared_with_paper(report))
    for target, source in FIGURES.items():
        shutil.copyfile(args.run / "evaluation" / f"{source}.svg", ROOT / "docs" / "images" / f"{target}.svg")


def replace_between(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- name:start --> and <!-- name:end -->."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(start) != 1 or content.count(end) != 1:
        raise UserError(f"{path} must contain {start} and {end} once; add these lines around the demo's numbers")
    before, after = content.split(start)[0], content.split(end)[1]
    write_text(path, f"{before}{start}\n{text}\n{end}{after}")


def results(report: dict[str, Any], checks: dict[str, Any]) -> str:
    """Markdown: bits per byte of each model and language with the change against base, then what was not shown."""
    bits = {
        model: {name: f"{b['value']:.3f}" for name, b in by.items()} for model, by in report["bits_per_byte"].items()
    }
    rows = []
    for language, group in report["languages"].items():
        cells = [f"{bits[m][language]} ({percent(report['change'][m][language]['value'])})" for m in MODELS]
        rows.append([f"{language_name(language)}, {group}", bits["base"][language], *cells])
    judgments = [*judge(report, checks)]
    verdicts = [f"{judgment.claim}: {judgment.found}." for judgment in judgments if not judgment.language]
    missed = [judgment for judgment in judgments if not judgment.ok]
    shown = f"{len(judgments) - len(missed)} of {len(judgments)} claims"
    lines = [
        markdown_table(Table(["bits per byte, held-out text", "base", *MODELS.values()], rows)),
        " ".join([*verdicts, f"This run shows {shown}.{' Not shown:' if missed else ''}"]),
    ]
    items = [f"- {language_name(c.language) or c.name}: {c.found}; claim: {c.claim}" for c in missed]
    return "\n\n".join(lines + (["\n".join(items)] if items else []))


def compared_with_paper(report: dict[str, Any]) -> str:
    """Markdown: what the demo's bits per byte and the paper's scores have in common, as fractions without a unit."""

    def demo(model: str, group: str) -> float:
        """Mean change in bits per byte over the languages of a group."""
        changes = report["change"][model]
        return fmean(changes[language]["value"] for language, its in report["languages"].items() if its == group)

    def paper(model: str, group: str) -> float:
        """Points above base."""
        return PAPER_SCORES[model][group] - PAPER_SCORES["base"][group]

    names = {
        "forgetting of stage 1 that review repairs, original languages": ("stage1", "original"),
        "learning of stage 1 that is left after review, expanded languages": ("stage1", "expanded"),
        "forgetting after both stages, as a fraction of full fine-tuning's": ("full_finetune", "original"),
        "learning after both stages, as a fraction of full fine-tuning's": ("full_finetune", "expanded"),
    }
    rows = []
    for number, (name, (model, group)) in enumerate(names.items()):
        left = [value("stage2", group) / value(model, group) for value in (demo, paper)]
        rows.append([name, *(f"{1 - fraction if number == 0 else fraction:.0%}" for fraction in left)])
    return markdown_table(Table(["", "demo, bits per byte", "paper, benchmark scores"], rows))


if __name__ == "__main__":
    run_command(main)
