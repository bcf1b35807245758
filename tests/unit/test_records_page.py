"""docs/data-format.md lists every record as its type is, docs/languages-file.md every key of languages.yaml."""

from pathlib import Path

import pytest

from moelpr.project.file import schema
from tests.support import records_page


@pytest.mark.parametrize("page", records_page.PAGES, ids=lambda page: page.name)
def test_the_page_is_current(page: Path) -> None:
    assert page.read_text() == records_page.current(page), "run python -m tests.support.records_page"


def test_every_key_of_a_project_is_listed_with_a_meaning() -> None:
    lines = records_page.keys().splitlines()
    for kind in [schema(), *schema()["$defs"].values()]:
        for key, described in kind.get("properties", {}).items():
            meaning = described["description"].replace("\n", " ")
            assert any(line.startswith(f"| `{key}` |") and meaning in line for line in lines), key


def test_every_field_has_a_meaning() -> None:
    for kind in records_page.record_types():
        described = records_page.describe(kind).attributes
        fields = {name for name in kind.__annotations__ if not name.isupper()}
        assert fields == described.keys(), kind
