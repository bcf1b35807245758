"""Pages made of blocks, written as one HTML file and as Markdown with the same text and numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from moelpr.base.files import write_text
from moelpr.base.text_tables import table_text


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["plain", "summary", "note"] = "plain"


@dataclass(frozen=True)
class Points:
    """A list with bullets; with a title in bold, it is highlighted."""

    items: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    below: str = ""  # small text under `text`
    change: float | None = None  # relative change that tints the cell; negative is better


@dataclass(frozen=True)
class Row:
    """A row of a table, named by its first cell."""

    cells: Sequence[str | Cell]
    kind: Literal["", "group", "mean"] = ""  # "group": a heading above rows; "mean": a summary of the rows before it

    @property
    def full_cells(self) -> list[Cell]:
        return [Cell(cell) if isinstance(cell, str) else cell for cell in self.cells]


@dataclass(frozen=True)
class Table:
    """A table; a row of plain strings needs no Row."""

    head: Sequence[str]
    rows: Sequence[Row | Sequence[str]]
    note: str = ""
    # Indices of columns that contain words, besides the first; the others are aligned to the right.
    text_columns: Sequence[int] = ()

    @property
    def full_rows(self) -> list[Row]:
        return [row if isinstance(row, Row) else Row(row) for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """Charts next to each other."""

    svgs: Sequence[str]  # complete SVG documents of `moelpr.measure.report.plots`
    caption: str = ""
    table: Table | None = None  # the same in numbers, for Markdown
    name: str = ""  # if given, the only chart is also written as NAME.svg, which Markdown shows
    is_grid: bool = False  # charts of equal width in columns


@dataclass(frozen=True)
class Sample:
    """Continuations of a prompt in `language` (its code): name -> text."""

    language: str
    title: str
    prompt: str
    texts: Mapping[str, str]

    @property
    def table(self) -> "Table":
        return Table(["", f"{self.prompt} …"], list(self.texts.items()), text_columns=[1])


@dataclass(frozen=True)
class Facts:
    """Lists of facts: title -> name -> value."""

    groups: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Code:
    """Text to copy; of `folded` text, only the title is visible until it is opened."""

    text: str
    title: str = ""
    folded: bool = False

    @property
    def fence(self) -> str:
        """A fence that is longer than any in the text."""
        return "`" * max(3, 1 + max(map(len, re.findall("`+", self.text)), default=0))


Block = Text | Points | Table | Figure | Sample | Facts | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; title "" for the first one. Sections without blocks are not written."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page; `kicker` is a small line above the title."""

    title: str
    kicker: str = ""
    sections: Sequence[Section] = field(default_factory=list)


def write_page(folder: Path, name: str, page: Page) -> Path:
    """Write NAME.html, NAME.md and the figures that have a name into `folder`; returns the path of the HTML file."""
    blocks = [block for section in page.sections for block in section.blocks]
    files = {f"{block.name}.svg": block.svgs[0] for block in blocks if isinstance(block, Figure) and block.name}
    for file, text in (files | {f"{name}.md": to_markdown(page), f"{name}.html": to_html(page)}).items():
        write_text(folder / file, text)
    return folder / f"{name}.html"


def to_html(page: Page) -> str:
    """One file without scripts that loads nothing; text of models and languages is escaped."""
    return _templates(autoescape=True).get_template("page.html").render(page=page)


def to_markdown(page: Page) -> str:
    """The same text and numbers; curves as tables."""
    template = _templates(finalize=_escape).get_template("block.md")
    parts = [f"# {_escape(page.title)}", _escape(page.kicker)]
    for section in page.sections:
        parts += [f"## {_escape(section.title)}"] if section.title and section.blocks else []
        parts += [template.render(block=block).strip() for block in section.blocks]
    return "\n\n".join(filter(None, parts)) + "\n"


def terminal_table(table: Table) -> str:
    """The table as plain text."""
    rows = [[*map(_line, row.full_cells)] for row in table.full_rows]
    return table_text(table.head, rows, (0, *table.text_columns))


def markdown_table(table: Table, escape: Callable[[str], str] = str) -> str:
    """The table with aligned columns; `escape` makes Markdown of a text, by default texts are Markdown already."""
    rows = [list(map(escape, table.head))]
    for row in table.full_rows:
        cells = [_line(cell, escape) for cell in row.full_cells]
        cells = [f"**{cell}**" if row.kind and cell else cell for cell in cells]
        rows.append(cells + [""] * (len(table.head) - len(cells)))
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [index in (0, *table.text_columns) for index in range(len(widths))]
    rows.insert(1, ["-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text, strict=True)])
    forms = [f"{{:{'<' if text else '>'}{width}}}" for width, text in zip(widths, is_text, strict=True)]
    return "\n".join(f"| {' | '.join(forms)} |".format(*row) for row in rows)


def _templates(**options: Any) -> Environment:
    loader = PackageLoader("moelpr.measure.report")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["table"] = lambda table: Markup(markdown_table(table, _escape))
    return environment


def _line(cell: Cell, escape: Callable[[str], str] = str) -> str:
    return escape(cell.text) + (f" ({escape(cell.below)})" if cell.below else "")


def _escape(text: str) -> str:
    """Text of models and languages must not become markup; a bracket that opens no link stays readable."""
    if isinstance(text, Markup):
        return text
    text = re.sub(r"([\\`*_#|])", r"\\\1", re.sub(r"[\r\n]", " ", text))
    # An entity, because not every viewer of Markdown knows a backslash before "<".
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    return re.sub(r"\](?=[(\[:])", r"\\]", text)
