"""Tables keep every character, in a pipe too."""

from moelpr.process.text_tables import table_text


def test_columns_are_aligned_and_neither_cut_nor_styled() -> None:
    """A terminal has 80 columns; [b] is markup of rich."""
    name = "[b]" + "x" * 200
    rows = [[name, "1", "α\nβ"], ["y", "1,000", "γ"]]
    head, first, second, third = table_text(["name", "n", "note"], rows, (0, 2)).splitlines()
    assert head.split() == ["name", "n", "note"] and first == f"{name}      1  α"
    assert second.split() == ["β"] and second.index("β") == first.index("α") == third.index("γ")
    assert third.split() == ["y", "1,000", "γ"]
