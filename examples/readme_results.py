"""Put a finished demo's numbers into README.md and its picture into docs/images/demo.svg.

python examples/readme_results.py --run runs/demo
"""

import argparse
import shutil
from pathlib import Path

from moelpr.errors import UserError, run_command
from moelpr.report.demo import Report, failures, percent, read_report

START, END = "<!-- demo-table:start -->", "<!-- demo-table:end -->"
COLUMNS = {
    "base": "base",
    "full_finetune": "full fine-tuning",
    "stage1": "MoE-LPR, stage 1",
    "stage2": "MoE-LPR, stage 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file to change (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    report = read_report(args.run)
    text = args.readme.read_text()
    if START not in text or END not in text:
        raise UserError(f"{args.readme} lacks the lines {START} and {END} that the table goes between; add them")
    before, after = text.split(START)[0], text.split(END)[1]
    args.readme.write_text(f"{before}{START}\n{results(report)}\n{END}{after}")
    picture = args.readme.parent / "docs" / "images" / "demo.svg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.run / "headline.svg", picture)


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


if __name__ == "__main__":
    run_command(main)
