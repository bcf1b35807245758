"""The plans in README.md and the tutorials, made by `moelpr plan` for a project's file, with text that stands in.

    python -m tests.support.plan_pages

A page has a marker, `<!-- plan: FILE -->`, after which there is a block with the command and what it prints; of
`<!-- plan: FILE grep 'PATTERN' -->`, the lines that match.
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path

from moelpr.base.files import write_text
from moelpr.project import tables
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from tests.support.model_shapes import save_config
from tests.support.small_tokenizers import documents_in

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"<!-- plan: (\S+)(?: grep '(.*?)')? -->\n(```\n.*?\n```\n)?", re.DOTALL)
GB = 10**9
# The assumed text of the files that are planned: bytes per language; of others, as much as replay needs.
BYTES = {"el": 8, "hu": 8, "tr": 8, "eu": 6, "ca": 30, "gl": 8, "ar": 20, "he": 12, "is": 4}
OTHERS = 0.2
MORE = {"examples/users/paper.yaml": 4}  # times as much


def plan(file: str, folder: Path) -> str:
    """The output of `moelpr plan` for a file, in a folder where its text and its base's configuration are made."""
    with contextlib.chdir(folder):
        path = Path(Path(file).name)
        path.write_text((ROOT / file).read_text())
        make_text(path, MORE.get(file, 1))
        places = ResolvedProject(read_project(path))
        save_config(Path(places.model_name).name, places.base)
        return tables.plan(ResolvedProject(read_project(path)))


def make_text(path: Path, times: float) -> None:
    """Make the text that a file names: folders get one file; all but its start is a hole, which takes no space.

    A name on the Hub or in a bucket becomes a local one.
    """
    path.write_text(re.sub("hf://datasets/|s3://", "", path.read_text()))
    for code, names in re.findall(r"^    (\w+): (?:\{text: )?([^,}\n]+)", path.read_text(), re.MULTILINE):
        target = Path(names if Path(names).suffix else f"{names}/000_00000.jsonl")
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [f'{{"text": "{document}"}}\n'.replace("\n", " ", 1) for document in documents_in("hu", 200)]
        target.write_text("".join(lines))
        os.truncate(target, int(BYTES.get(code, OTHERS) * times * GB))


def current(page: Path) -> str:
    """A page with its plans as they should be."""

    def block(found: re.Match[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            printed = plan(found[1], Path(folder))
        command, pattern = f"$ moelpr plan {Path(found[1]).name}", found[2] or ""
        command += f" | grep -E '{pattern}'" if pattern else ""
        lines = [line.rstrip() for line in printed.splitlines() if re.search(pattern, line)]
        return "\n".join([found[0].splitlines()[0], "```", command, *lines, "```", ""])

    return BLOCK.sub(block, page.read_text())


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, current(page))
