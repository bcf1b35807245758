"""Put what the queue has measured into the documentation.

    python -m examples.real_model.results --run runs/real-model

Writes docs/real-model.json, docs/images/real-model.svg and real-model-routing.svg, the section of docs/results.md and
the line of README.md between their marks; of a short queue, docs/unseen-short.json, its picture and its section of
docs/results.md. What RUN has not measured keeps the numbers that docs/real-model.json has of
the same base, text and tokens; so several machines can share the work. Settings that nobody has measured are named.
"""

from pathlib import Path
from typing import Any

from examples.readme_results import replace_between
from examples.real_model.arguments import parse
from examples.real_model.measurements import collect, is_short, merged
from examples.real_model.page import NAME, SHORT, charts, dump, readme_table, section
from examples.real_model.unseen_results import collect_unseen, unseen_picture, unseen_tables
from examples.tasks import ROOT
from moelpr.process.command import run_command
from moelpr.process.errors import UserError
from moelpr.store import records
from moelpr.store.files import write_text


def main() -> None:
    args = parse(__doc__.splitlines()[0], overwrite=False)
    if not (args.run / "corpus").is_dir():
        raise UserError(f"--run {args.run} contains no text; run make results first")
    if is_short(args.run):
        write_short(args.run)
        return
    path = ROOT / "docs" / f"{NAME}.json"
    remedy = f"restore it (git checkout {path}), or remove it to start again"
    before = records.read(dict[str, Any], path, remedy) if path.is_file() else {}
    results = merged(collect(args.run), before)
    if "copies" not in results["settings"]:
        raise UserError(f"--run {args.run} has no finished MoE-LPR yet; rerun make results")
    write_text(path, dump(results))
    for name, svg in charts(results).items():
        write_text(ROOT / "docs" / "images" / f"{name}.svg", svg + "\n")
    replace_between(ROOT / "docs" / "results.md", NAME, section(results, "images/"))
    table = f"![Learning and forgetting of every setting](docs/images/{NAME}.svg)\n\n{readme_table(results)}"
    replace_between(ROOT / "README.md", NAME, table)


def write_short(run: Path) -> None:
    """Put a short queue's numbers into the documentation."""
    results = collect_unseen(run)
    if not results:
        raise UserError(f"--run {run} has no evaluation of the base yet; rerun make results RESULTS=--short")
    write_text(ROOT / "docs" / f"{SHORT}.json", dump(results))
    write_text(ROOT / "docs" / "images" / f"{SHORT}.svg", unseen_picture(results) + "\n")
    replace_between(ROOT / "docs" / "results.md", SHORT, unseen_tables(results))


if __name__ == "__main__":
    run_command(main)
