"""Put what the queue has measured into the documentation.

    python -m examples.real_model.results --run runs/real-model

Writes docs/real-model.json, its pictures in docs/images, the section of docs/results.md and the line of README.md
between their marks; of a short queue, docs/unseen-short.json (with --plain, docs/unseen-plain.json), its picture and
its section of docs/results.md. What RUN has not measured keeps the numbers of the JSON file in docs/, which must be of
the same base and text; so several machines can share the work. Settings that nobody has measured are named.
"""

from typing import Any

from examples.readme_results import replace_between
from examples.real_model.arguments import parser_of
from examples.real_model.measurements import collect, is_short, merged
from examples.real_model.page import COLUMNS, NAME, PLAIN, SHORT, charts, dump, readme_table, section, short_name
from examples.real_model.unseen_results import (
    choices_table,
    collect_short,
    unseen_picture,
    unseen_tables,
    with_recorded,
)
from examples.tasks import ROOT
from moelpr.process.command import run_command
from moelpr.process.errors import UserError
from moelpr.store import records
from moelpr.store.files import write_text


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], overwrite=False)
    recorded = "draw pictures and tables again from the numbers in docs/, without a run"
    parser.add_argument("--recorded", action="store_true", help=recorded)
    args = parser.parse_args()
    if args.recorded:
        write_page(_recorded(NAME))
        for name in (SHORT, PLAIN):
            write_short(name, _recorded(name))
        return
    if not (args.run / "corpus").is_dir():
        raise UserError(f"--run {args.run} contains no text; run make results first")
    if is_short(args.run):
        name = short_name(args.run)
        if not (found := collect_short(args.run)):
            raise UserError(f"--run {args.run} has no evaluation of the base yet; rerun make results RESULTS=--short")
        write_short(name, with_recorded(found, _recorded(name)))
        return
    results = merged(collect(args.run), _recorded(NAME))
    if "copies" not in results["settings"]:
        raise UserError(f"--run {args.run} has no finished MoE-LPR yet; rerun make results")
    write_page(results)


def _recorded(name: str) -> dict[str, Any]:
    path = ROOT / "docs" / f"{name}.json"
    remedy = f"restore it (git checkout {path}), or remove it to start again"
    return records.read(dict[str, Any], path, remedy) if path.is_file() else {}


def write_page(results: dict[str, Any]) -> None:
    """Put the numbers of a whole queue into the documentation."""
    write_text(ROOT / "docs" / f"{NAME}.json", dump(results))
    for name, svg in charts(results).items():
        write_text(ROOT / "docs" / "images" / f"{name}.svg", svg + "\n")
    replace_between(ROOT / "docs" / "results.md", NAME, section(results, "images/"))
    table = f"![Learning and forgetting of every setting](docs/images/{NAME}.svg)\n\n{readme_table(results)}"
    replace_between(ROOT / "README.md", NAME, table)


def write_short(name: str, results: dict[str, Any]) -> None:
    """Put a short queue's numbers into the documentation."""
    write_text(ROOT / "docs" / f"{name}.json", dump(results))
    write_text(ROOT / "docs" / "images" / f"{name}.svg", unseen_picture(results) + "\n")
    replace_between(ROOT / "docs" / "results.md", name, unseen_tables(results, COLUMNS[name]))
    if all(recorded := [_recorded(SHORT), _recorded(PLAIN)]):
        for page in (ROOT / "docs" / "results.md", ROOT / "README.md"):
            replace_between(page, "choices", choices_table(*recorded))


if __name__ == "__main__":
    run_command(main)
