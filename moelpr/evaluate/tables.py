"""A table of results, as Markdown for a terminal and as HTML for a page."""

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """The first column names the row; the others hold numbers and stand on the right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Header and rows, with aligned columns."""
        cells = [self.header, *self.rows]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(
            "| "
            + " | ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
            + " |"
            for row in [cells[0], rule, *cells[1:]]
        )

    def markdown_section(self) -> str:
        """The table under its title, with its note."""
        return "\n\n".join(text for text in (self.title, self.markdown(), self.note) if text)

    def html_section(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr><th>{escape(row[0])}</th>"
            + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return (
            f'<h2>{escape(self.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{note}"
        )
