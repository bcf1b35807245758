"""A report as one HTML page: no script, nothing loaded from anywhere, fit for a phone, dark screens and paper."""

import math
from collections.abc import Sequence
from html import escape

from moelpr.report.document import (
    Block,
    Cell,
    Code,
    Curves,
    Document,
    Facts,
    Picture,
    Row,
    Sample,
    Table,
    Text,
    Verdict,
)
from moelpr.report.style import CSS


def to_html(document: Document) -> str:
    parts = [f'<p class="kicker">{escape(document.kicker)}</p><h1>{escape(document.title)}</h1>']
    for section in document.sections:
        if section.blocks:
            parts.append(f"<h2>{escape(section.title)}</h2>" if section.title else "")
            parts += [_block(block) for block in section.blocks]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(document.kicker)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Text():
            style = "" if block.kind == "plain" else f' class="{block.kind}"'
            return f"<p{style}>{escape(block.text)}</p>"
        case Verdict():
            return _verdict(block)
        case Table():
            return _table(block)
        case Picture():
            caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
            return f'<figure><div class="pictures">{"".join(block.svgs)}</div>{caption}</figure>'
        case Curves():
            return f'<div class="charts">{"".join(block.svgs)}</div>{_note(block.note)}' if block.svgs else ""
        case Sample():
            return _sample(block)
        case Facts():
            return _facts(block)
        case Code():
            code = f"<pre><code>{escape(block.text)}</code></pre>"
            if block.folded:
                return f"<details><summary>{escape(block.title)}</summary>{code}</details>"
            return (f"<p>{escape(block.title)}</p>" if block.title else "") + code


def _verdict(verdict: Verdict) -> str:
    missed = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.missed)
    items = f"<ul>{missed}</ul>" if missed else ""
    return (
        f'<div class="verdict{" missed" if missed else ""}"><b>{escape(verdict.finding)}</b>'
        f"{escape(verdict.details)}{items}</div>"
    )


def _table(table: Table) -> str:
    words = {0, *table.text_columns}
    head = "".join(
        f"<th{_class('text' if column in words else '')}>{escape(title)}</th>"
        for column, title in enumerate(table.head)
    )
    rows = "".join(_row(row, len(table.head), words) for row in table.rows)
    return (
        f'<div class="scroll whole"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_note(table.note)}"
    )


def _row(row: Row, num_columns: int, words: set[int]) -> str:
    if row.kind == "group":
        return f'<tr class="group"><th colspan="{num_columns}">{_cell(row.cells[0])}</th></tr>'
    cells = [f'<th class="text">{_cell(row.cells[0])}</th>']
    for column, cell in enumerate(row.cells[1:], start=1):
        change = cell.change if isinstance(cell, Cell) else None
        tint = f' style="background:{_tint(change)}"' if change is not None and math.isfinite(change) else ""
        cells.append(f"<td{_class('text' if column in words else 'number')}{tint}>{_cell(cell)}</td>")
    return f"<tr{_class(row.kind)}>{''.join(cells)}</tr>"


def _cell(cell: Cell | str | Sequence[Cell]) -> str:
    if isinstance(cell, str):
        return _pieces(cell)
    if not isinstance(cell, Cell):
        return "".join(f'<div class="line">{_cell(line)}</div>' for line in cell)
    mark = "" if cell.ok is None else f'<span class="{"ok" if cell.ok else "no"}">{_MARKS[cell.ok]}</span> '
    below = f"<small>{_pieces(cell.below)}</small>" if cell.below else ""
    text = f"<span>{escape(cell.text)}</span>" if mark else _pieces(cell.text)
    return f"{mark}{text}{below}"


def _pieces(text: str) -> str:
    """A number and its interval may stand under each other, but neither is torn apart."""
    number, bracket, interval = text.partition(" [")
    return f"<span>{escape(number)}</span>" + (f" <span>[{escape(interval)}</span>" if bracket else "")


_MARKS = {True: "✓ shown", False: "✗ not shown"}


def _tint(change: float) -> str:
    """Green-blue for better, orange for worse, stronger up to 30%; the sign is printed, so colour is not needed."""
    red, green, blue = (38, 139, 120) if change < 0 else (222, 120, 40)
    return f"rgb({red} {green} {blue} / {0.5 * min(abs(change) / 0.3, 1.0) ** 0.7:.2f})"


def _sample(sample: Sample) -> str:
    attributes = f'lang="{escape(sample.language)}" dir="auto"'
    items = "".join(
        f"<dt>{escape(name)}</dt><dd {attributes}>{escape(text) or '<i>(nothing)</i>'}</dd>"
        for name, text in sample.texts.items()
    )
    return (
        f'<div class="sample"><h3>{escape(sample.title)}</h3>'
        f'<p class="prompt" {attributes}>{escape(sample.prompt)} …</p><dl>{items}</dl></div>'
    )


def _facts(facts: Facts) -> str:
    sections = [
        f"<section><h3>{escape(title)}</h3><dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
        + "</dl></section>"
        for title, values in facts.blocks.items()
        if values
    ]
    return f'<div class="columns">{"".join(sections)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
