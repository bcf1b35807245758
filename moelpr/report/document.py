"""What a report says, apart from how it is written: to_html.py and to_markdown.py write it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["plain", "summary", "note"] = "plain"


@dataclass(frozen=True)
class Verdict:
    """What was found, first in bold; missed: a sentence for each thing that is not so."""

    finding: str
    details: str = ""
    missed: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """below: in small under the text. change: relative, fewer being better; tints the cell. ok: marks the text."""

    text: str
    below: str = ""
    change: float | None = None
    ok: bool | None = None


@dataclass(frozen=True)
class Row:
    """The first cell names it. group: a title above rows; mean: a summary of the rows before it."""

    cells: Sequence[Cell | str | Sequence[Cell]]
    kind: Literal["", "group", "mean"] = ""


@dataclass(frozen=True)
class Table:
    """text_columns: those, besides the first, that hold words and not numbers."""

    head: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    text_columns: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """svgs: drawings, side by side where there is room. table: the same in numbers, for where there are none."""

    svgs: Sequence[str]
    caption: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Curves:
    """Line charts, side by side where there is room. table: the same in numbers, for where there are no pictures."""

    svgs: Sequence[str]
    table: Table | None = None
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """How each of several models goes on after the prompt; language: its code."""

    language: str
    title: str
    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """Title -> name -> value."""

    blocks: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Code:
    """Text to be copied; title: shown above it. folded: only the title is shown until it is opened."""

    text: str
    title: str = ""
    folded: bool = False


Block = Text | Verdict | Table | Picture | Curves | Sample | Facts | Code


@dataclass(frozen=True)
class Section:
    title: str  # "" for what comes first
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """kicker: what it is about, above the title. Sections without blocks are not written."""

    title: str
    kicker: str
    sections: Sequence[Section] = field(default_factory=list)
