"""docs/data-format.md lists every record as its type is."""

from tests.support import records_page


def test_the_page_is_current() -> None:
    assert records_page.PAGE.read_text() == records_page.current_page(), "run python -m tests.support.records_page"


def test_every_field_has_a_meaning() -> None:
    for kind in records_page.record_types():
        described = records_page.describe(kind).attributes
        fields = {name for name in kind.__annotations__ if not name.isupper()}
        assert fields == described.keys(), kind
