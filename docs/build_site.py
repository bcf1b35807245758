"""Build the documentation as a site, which refuses a link that leads nowhere.

    make docs

The pages are those of the repository, at the same places, so that their links need no change. The navigation follows
docs/README.md. A page per package shows its docstrings.
"""

import logging
import re
import shutil
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
PACKAGES = ("moelpr", "data_tools", "checkpoint_convert")


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for file in [*ROOT.glob("examples/*.yaml"), *ROOT.glob("examples/users/*.yaml")]:
        (SOURCE / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, SOURCE / file.relative_to(ROOT))
    for page in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE"):
        shutil.copyfile(ROOT / page, SOURCE / page)
    guide, _, design = (SOURCE / "docs" / "README.md").read_text("utf-8").partition("For developers:")
    nav = [
        {"Overview": "README.md"},
        {"Guide": "docs/README.md"},
        *({title: linked_pages(pages)} for title, pages in re.findall(r"^## (.+)\n([^#]*)", guide, re.MULTILINE)),
        {"Design": linked_pages(design)},
        {"API": api_pages()},
        {"Development": ["CONTRIBUTING.md", "CHANGELOG.md"]},
    ]
    paths = {"docs_dir": str(SOURCE), "site_dir": str(SITE)}
    build(load_config(str(ROOT / "mkdocs.yml"), **paths, nav=nav, strict=True))
    print(f"{SITE / 'index.html'}")


def linked_pages(text: str) -> list[str]:
    return [f"docs/{page}" for page in re.findall(r"\]\(([\w/-]+\.md)\)", text)]


def api_pages() -> list[dict[str, str]]:
    """Write a page per package with Python modules; title -> page, for the navigation."""
    modules: dict[str, list[str]] = {}
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" and not parts[-1].startswith("_"):
            modules.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    (SOURCE / "api").mkdir()
    for package, names in modules.items():
        page = "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)])
        (SOURCE / "api" / f"{package}.md").write_text(f"{page}\n", "utf-8")
    return [{package: f"api/{package}.md"} for package in sorted(modules)]


if __name__ == "__main__":
    main()
