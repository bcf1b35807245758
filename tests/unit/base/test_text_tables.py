"""Tables keep every character, in a pipe too."""

import subprocess
import sys

from moelpr.base.text_tables import table_text


def test_columns_are_aligned_and_neither_cut_nor_styled() -> None:
    """A terminal has 80 columns; [b] is markup of rich."""
    name = "[b]" + "x" * 200
    rows = [[name, "1", "α\nβ"], ["y", "1,000", "γ"]]
    head, first, second, third = table_text(["name", "n", "note"], rows, (0, 2)).splitlines()
    assert head.split() == ["name", "n", "note"] and first == f"{name}      1  α"
    assert second.split() == ["β"] and second.index("β") == first.index("α") == third.index("γ")
    assert third.split() == ["y", "1,000", "γ"]
    assert table_text(["name"], [["\x1b[2J\r\x9b"]]).splitlines()[1] == r"\x1b[2J\r\x9b"


def test_a_table_draws_no_random_number() -> None:
    """A checkpoint contains the state of Python's random numbers."""
    code = """if True:
        import random
        from moelpr.base.text_tables import table_text
        before = random.getstate()
        table_text(["a"], [["b"]])
        assert random.getstate() == before
    """
    subprocess.run([sys.executable, "-c", code], check=True)
