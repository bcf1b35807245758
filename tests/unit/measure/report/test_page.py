import re

from moelpr.measure.report.page import (
    Cell,
    Code,
    Facts,
    Figure,
    Page,
    Points,
    Row,
    Sample,
    Section,
    Table,
    Text,
    markdown_table,
    terminal_table,
    to_html,
    to_markdown,
)

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><title>t</title></svg>'
EVIL = '<script>x</script> & "[a](http://e.org)" `*_|#\r&lt;b>'
TABLE = Table(
    ["language", "base", "new"],
    [
        Row(["Expanded"], "group"),
        ["Greek", "2.000", "1.900 [1.8, 2.0]"],
        Row(["mean", "2.000", Cell("1.900", "\u22125.0%", -0.05)], "mean"),
        Row([Cell("promise", "at most 3"), Cell("a: 1"), Cell("b: 4")]),
    ],
    "A note.",
)


def page_of(*blocks: object) -> Page:
    return Page("Title", "kicker", [Section("", []), Section("Part", list(blocks)), Section("empty", [])])


def test_no_name_becomes_markup_anywhere() -> None:
    table = Table([EVIL, EVIL], [[EVIL, EVIL], Row([EVIL], "group"), Row([EVIL, Cell(EVIL, EVIL, 0.1)])], EVIL)
    blocks = [Text(EVIL), Points([EVIL]), Points([EVIL], EVIL), table, Figure([SVG], EVIL)]
    blocks += [Sample('el" onload="x', EVIL, EVIL, {EVIL: EVIL}), Facts({EVIL: {EVIL: EVIL}}), Code("x", EVIL, True)]
    page = Page(EVIL, EVIL, [Section(EVIL, blocks)])
    html, markdown = to_html(page), to_markdown(page)
    assert "<script" not in html and 'onload="' not in html and html.count("&lt;script&gt;") > 15
    assert "<script" not in markdown and markdown.count("&lt;script>") > 15 and "\r" not in markdown
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)`|(?<!\\)\*_", markdown.removesuffix("```\nx\n```\n"))
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_code_stays_code_and_sections_without_blocks_are_not_written() -> None:
    text = "a\n```\n<b>"
    page = page_of(Code(text))
    assert "&lt;b&gt;" in to_html(page)
    assert to_markdown(page) == f"# Title\n\nkicker\n\n## Part\n\n````\n{text}\n````\n"
    assert re.findall("<h[12]>(.*?)</h[12]>", to_html(page)) == ["Title", "Part"]


def test_table_has_aligned_columns_in_markdown_and_on_the_terminal() -> None:
    lines = to_markdown(page_of(TABLE)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2].split("|")[1].strip() == "**Expanded**"
    assert "| Greek               |     2.000 |  1.900 [1.8, 2.0] |" in rows
    assert "| promise (at most 3) |      a: 1 |              b: 4 |" in rows
    assert len({len(row) for row in rows}) == 1
    assert markdown_table(Table(["a_b", "c"], [["x*", "1"]])).splitlines()[-1] == "| x*  |   1 |"
    assert terminal_table(TABLE).splitlines()[-1].split("  ")[0] == "promise (at most 3)"


def test_page_tints_cells_runs_nothing_and_loads_nothing() -> None:
    html = to_html(page_of(TABLE, Figure([SVG])))
    assert html.count("background:rgb(38 139 120") == 1
    assert "<span>1.900</span> <span>[1.8, 2.0]</span>" in html
    assert "<small><span>\u22125.0%</span></small>" in html
    assert not re.search(r"<(script|link|iframe|object|img)\b|@import|url\((?!#)|\b(src|href)\s*=\s*\"(?!#)", html)
    assert SVG in html and "prefers-color-scheme: dark" in html and "@media print" in html
