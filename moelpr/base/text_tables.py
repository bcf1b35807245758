"""Tables on terminals and in logs, laid out by rich."""

import random
import textwrap
from collections.abc import Collection, Iterable, Sequence

from moelpr.base.errors import printable


def table_text(
    head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Collection[int] = (0,), indent: str = ""
) -> str:
    """The table as plain text, the same on a terminal and in a pipe; it is never cut to the terminal's width.

    Args:
        head: A title per column.
        rows: A text per column; a cell may have several lines.
        text_columns: Indices of the columns that are aligned to the left; numbers are aligned to the right.
        indent: What precedes each line.
    """
    state = random.getstate()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    random.setstate(state)  # rich draws a number when it is imported, and the trainer saves Python's state
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, title in enumerate(head):
        table.add_column(Text(title), justify="left" if index in text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in row))
    console = Console(width=100_000, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return textwrap.indent("\n".join(line.rstrip() for line in capture.get().splitlines()), indent)
