"""Pages made of blocks, written as one HTML file and as Markdown with the same text and numbers."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from moelpr.files import atomic_file


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["plain", "summary", "note"] = "plain"


@dataclass(frozen=True)
class Points:
    """A list with bullets."""

    items: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """A highlighted result.

    Attributes:
        finding: in bold.
        details: continues the sentence of `finding`.
        missed: one item per thing that failed.
    """

    finding: str
    details: str = ""
    missed: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        below: small text under `text`.
        change: relative change that tints the cell; negative is better.
        ok: marks the cell as shown or not shown.
    """

    text: str
    below: str = ""
    change: float | None = None
    ok: bool | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table, named by its first cell; a cell may have several lines.

    Attributes:
        kind: "group" is a heading above rows, "mean" a summary of the rows before it.
    """

    cells: Sequence[str | Cell | Sequence[Cell]]
    kind: Literal["", "group", "mean"] = ""

    def lines(self, index: int) -> list[Cell]:
        cell = self.cells[index]
        return [Cell(cell)] if isinstance(cell, str) else [cell] if isinstance(cell, Cell) else list(cell)


@dataclass(frozen=True)
class Table:
    """A table; a row of plain strings needs no Row.

    Attributes:
        text_columns: indices of columns that contain words, besides the first; the others are aligned to the right.
    """

    head: Sequence[str]
    rows: Sequence[Row | Sequence[str]]
    note: str = ""
    text_columns: Sequence[int] = ()

    @property
    def full_rows(self) -> list[Row]:
        return [row if isinstance(row, Row) else Row(row) for row in self.rows]

    @property
    def words(self) -> set[int]:
        return {0, *self.text_columns}


@dataclass(frozen=True)
class Figure:
    """Charts next to each other.

    Attributes:
        svgs: complete SVG documents of `moelpr.report.plots`.
        table: the same in numbers, for Markdown.
        name: if given, the only chart is also written as NAME.svg, which Markdown shows.
        is_grid: charts of equal width in columns.
    """

    svgs: Sequence[str]
    caption: str = ""
    table: Table | None = None
    name: str = ""
    is_grid: bool = False


@dataclass(frozen=True)
class Sample:
    """Continuations of a prompt in `language` (its code): name -> text."""

    language: str
    title: str
    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """Title -> name -> value."""

    groups: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Code:
    """Text to copy. folded: only the title is visible until it is opened."""

    text: str
    title: str = ""
    folded: bool = False


Block = Text | Points | Verdict | Table | Figure | Sample | Facts | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; title "" for the first one. Sections without blocks are not written."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """kicker: a small line above the title."""

    title: str
    kicker: str = ""
    sections: Sequence[Section] = field(default_factory=list)


def write_page(folder: Path, name: str, page: Page) -> Path:
    """Write NAME.html, NAME.md and the figures that have a name into `folder`, replacing existing files.

    Returns:
        The path of the HTML file.
    """
    blocks = [block for section in page.sections for block in section.blocks]
    files = {f"{block.name}.svg": block.svgs[0] for block in blocks if isinstance(block, Figure) and block.name}
    for file, text in (files | {f"{name}.md": to_markdown(page), f"{name}.html": to_html(page)}).items():
        with atomic_file(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / f"{name}.html"


# ------------------------------------------------------------------------------------------------------------ HTML


def to_html(page: Page) -> str:
    """One file without scripts that loads nothing; text of models and languages is escaped."""
    environment = Environment(
        loader=PackageLoader("moelpr.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"kind": lambda block: type(block).__name__, "tint": _tint}
    return environment.get_template("page.html").render(page=page)


def _tint(lines: Sequence[Cell]) -> Markup:
    """Green-blue for better, orange for worse, stronger up to 30%; the sign is printed, so color is not needed."""
    change = lines[0].change if len(lines) == 1 else None
    if change is None or not math.isfinite(change):
        return Markup("")
    color = "38 139 120" if change < 0 else "222 120 40"
    return Markup(f' style="background:rgb({color} / {0.5 * min(abs(change) / 0.3, 1.0) ** 0.7:.2f})"')


# -------------------------------------------------------------------------------------------------------- Markdown


def to_markdown(page: Page) -> str:
    """The same text and numbers; curves as tables."""
    parts = [f"# {_escape(page.title)}", _escape(page.kicker)]
    for section in page.sections:
        blocks = [text for text in map(_markdown_block, section.blocks) if text]
        parts += [f"## {_escape(section.title)}"] if section.title and blocks else []
        parts += blocks
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal_table(table: Table) -> str:
    """A table with aligned columns as plain text."""
    return _aligned_table(table, lambda text: text)


def _markdown_block(block: Block) -> str:
    match block:
        case Text():
            return _escape(block.text)
        case Points():
            return _bullets(block.items)
        case Verdict():
            return f"**{_escape(block.finding)}**{_escape(block.details)}\n\n{_bullets(block.missed)}".strip()
        case Table():
            return "\n\n".join(filter(None, [_aligned_table(block, _escape), _escape(block.note)]))
        case Figure():
            if block.name:
                return f"![{_escape(block.caption)}]({block.name}.svg)"
            return "\n\n".join(
                filter(None, [_escape(block.caption), _markdown_block(block.table) if block.table else ""])
            )
        case Sample():
            rows = [Row([name, text]) for name, text in block.texts.items()]
            return f"### {_escape(block.title)}\n\n" + _aligned_table(
                Table(["", f"{block.prompt} …"], rows, text_columns=[1]), _escape
            )
        case Facts():
            return "\n\n".join(
                f"### {_escape(title)}\n\n" + _bullets([f"{name}: {value}" for name, value in facts.items()])
                for title, facts in block.groups.items()
                if facts
            )
        case Code():
            longest = max((len(ticks) for ticks in re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return (f"{_escape(block.title)}\n\n" if block.title else "") + f"{fence}\n{block.text.rstrip()}\n{fence}"


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {_escape(item)}" for item in items)


def _aligned_table(table: Table, escape: Callable[[str], str]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    rows = [list(map(escape, table.head))]
    for row in table.full_rows:
        cells = ["<br>".join(_markdown_cell(cell, escape) for cell in row.lines(i)) for i in range(len(row.cells))]
        cells = [f"**{cell}**" if row.kind and cell and escape is _escape else cell for cell in cells]
        rows.append(cells + [""] * (len(table.head) - len(cells)))
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [index in table.words for index in range(len(widths))]
    rows.insert(1, ["-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text, strict=True)])
    return "\n".join(
        "| "
        + " | ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in zip(row, widths, is_text, strict=True))
        + " |"
        for row in rows
    )


def _markdown_cell(cell: Cell, escape: Callable[[str], str]) -> str:
    mark = {None: "", True: "✓ ", False: "✗ "}[cell.ok]
    return mark + escape(cell.text) + (f" ({escape(cell.below)})" if cell.below else "")


def _escape(text: str) -> str:
    """Text of models and languages must not become markup; a bracket that opens no link stays readable."""
    text = re.sub(r"([\\`*_<#|])", r"\\\1", text.replace("\n", " "))
    return re.sub(r"\](?=[(\[:])", r"\\]", text)
