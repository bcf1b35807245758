"""An evaluation's files: the numbers as JSON, tables and pictures as Markdown and as one HTML page."""

import json
from html import escape
from pathlib import Path
from typing import Any, Protocol

from moelpr.evaluate.tables import Table
from moelpr.files import atomic_file
from moelpr.report.style import CSS
from moelpr.report.svg import Drawing


class Results(Protocol):
    """What can be written."""

    def to_json(self) -> dict[str, Any]: ...

    def findings(self) -> list[str]:
        """Sentences that say what the numbers say."""
        ...

    def tables(self) -> list[Table]: ...

    def pictures(self) -> dict[str, tuple[Drawing, str]]:
        """File name without its ending -> picture and caption."""
        ...


def write_outputs(folder: Path, name: str, title: str, results: Results) -> None:
    """Write NAME.json, NAME.md, NAME.html and each picture as SVG into `folder`, replacing what is there."""
    findings, tables, pictures = results.findings(), results.tables(), results.pictures()
    _write(folder / f"{name}.json", json.dumps(results.to_json(), indent=1, ensure_ascii=False, allow_nan=False))
    for picture, (drawing, _) in pictures.items():
        _write(folder / f"{picture}.svg", drawing.render())
    markdown = [f"# {title}", "\n".join(f"- {sentence}" for sentence in findings)]
    markdown += [f"![{caption}]({picture}.svg)" for picture, (_, caption) in pictures.items()]
    markdown += [f"## {table.title}\n\n{table.markdown()}\n\n{table.note}".rstrip() for table in tables]
    _write(folder / f"{name}.md", "\n\n".join(text for text in markdown if text))
    _write(folder / f"{name}.html", _page(title, findings, tables, pictures))


def _page(title: str, findings: list[str], tables: list[Table], pictures: dict[str, tuple[Drawing, str]]) -> str:
    """One file, no script, nothing loaded from anywhere."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in findings) + "</ul>" if findings else "",
        *(
            f'<figure class="scroll">{drawing.render()}<figcaption>{escape(caption)}</figcaption></figure>'
            for drawing, caption in pictures.values()
        ),
        *(table.html_section() for table in tables),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>"
    )


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
