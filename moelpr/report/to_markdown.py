"""A report as Markdown: the same words and numbers, curves as tables, no pictures."""

from collections.abc import Sequence

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


def to_markdown(document: Document) -> str:
    parts = [f"# {_escape(document.title)}", _escape(document.kicker)]
    for section in document.sections:
        blocks = [text for text in map(_block, section.blocks) if text]
        if blocks:
            parts += [f"## {_escape(section.title)}"] if section.title else []
            parts += blocks
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text():
            return _escape(block.text)
        case Verdict():
            sentence = f"**{_escape(block.finding)}**{_escape(block.details)}"
            return "\n".join([sentence, *([""] if block.missed else []), *(f"- {_escape(m)}" for m in block.missed)])
        case Table():
            return _table(block)
        case Picture():
            return "\n\n".join([_escape(block.caption), *([_table(block.table)] if block.table else [])])
        case Curves():
            return _table(block.table) if block.table else ""
        case Sample():
            rows = [f"| {_cell(name)} | {_cell(text)} |" for name, text in block.texts.items()]
            return "\n".join([f"### {_escape(block.title)}", "", f"| | {_cell(block.prompt)} … |", "|---|---|", *rows])
        case Facts():
            return "\n\n".join(
                "\n".join(
                    [f"### {_escape(title)}", "", *(f"- {name}: {_escape(value)}" for name, value in facts.items())]
                )
                for title, facts in block.blocks.items()
                if facts
            )
        case Code():
            fence = "````" if "```" in block.text else "```"
            title = f"{_escape(block.title)}\n\n" if block.title else ""
            return f"{title}{fence}\n{block.text.rstrip()}\n{fence}"


def _facts(title: str, facts: dict[str, str]) -> str:
    return "\n".join([f"### {_escape(title)}", "", *(f"- {_escape(name)}: {_escape(facts[name])}" for name in facts)])


def _table(table: Table) -> str:
    words = {0, *table.text_columns}
    lines = [
        f"| {' | '.join(map(_cell, table.head))} |",
        "|" + "|".join("---" if column in words else "---:" for column in range(len(table.head))) + "|",
    ]
    for row in table.rows:
        cells = [_cell(cell) for cell in row.cells]
        cells += [""] * (len(table.head) - len(cells))
        lines.append(f"| {' | '.join(f'**{cell}**' if _is_bold(row) and cell else cell for cell in cells)} |")
    return "\n".join([*lines, *(["", _escape(table.note)] if table.note else [])])


def _is_bold(row: Row) -> bool:
    return row.kind != ""


def _cell(cell: Cell | str | Sequence[Cell]) -> str:
    if isinstance(cell, str):
        return _escape(cell).replace("|", "\\|").replace("\n", " ")
    if not isinstance(cell, Cell):
        return "<br>".join(map(_cell, cell))
    mark = {None: "", True: "✓ ", False: "✗ "}[cell.ok]
    return mark + _cell(cell.text) + (f" ({_cell(cell.below)})" if cell.below else "")


def _escape(text: str) -> str:
    """Text of models and languages must not become markup."""
    for character in "\\`*_<[#":
        text = text.replace(character, "\\" + character)
    return text
