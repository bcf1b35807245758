import json
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record


@dataclass(frozen=True, config=STRICT)
class Size:
    width: int
    height: int


@dataclass(frozen=True, config=STRICT)
class Picture(Record):
    FILE_NAME: ClassVar[str] = "picture.json"
    REMEDY: ClassVar[str] = "draw it again"

    title: str
    size: Size
    tags: tuple[str, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.size.width < 1:
            raise UserError("size.width must be at least 1")


PICTURE = Picture("sea", Size(2, 3), ("blue",))


def message(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        Picture.read(folder)
    return str(raised.value)


sizes = st.builds(Size, st.integers(1), st.integers())


@settings(deadline=None)
@given(st.builds(Picture, st.text(), sizes, st.tuples(st.text()), st.floats(0, 9)))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> None:
    folder = tmp_path_factory.mktemp("record")
    picture.write(folder)
    assert Picture.read(folder) == picture
    assert next(iter(json.loads((folder / Picture.FILE_NAME).read_text()).items())) == ("format_version", 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": "1"}, "format_version"),
        ({"title": 3}, "title should be a valid string, got 3"),
        ({"title": True}, "title"),
        ({"size": {"width": True, "height": 1}}, "size.width should be a valid integer, got True"),
        ({"size": {"width": 1}}, "size.height is missing"),
        ({"size": {"width": 0, "height": 1}}, "size.width must be at least 1"),
        ({"more": 1}, "more is unknown"),
        ({"tags": [1, 2]}, "(the first of 2 errors)"),
        ({"scale": float("nan")}, "damaged"),
    ],
)
def test_a_wrong_field_is_named_with_the_file_and_the_remedy(tmp_path, changes, named) -> None:
    PICTURE.write(tmp_path)
    path = tmp_path / Picture.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    actual = message(tmp_path)
    assert named in actual and str(path) in actual and actual.endswith("draw it again") or "NaN" in actual


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"title": "\\ud800"}', b"\xff", b"[" * 100_000, b"\0", b'{"title": 1e999}']
)
def test_what_is_no_such_object_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / Picture.FILE_NAME).write_bytes(text)
    assert message(tmp_path).endswith("; draw it again")


def test_a_missing_file_is_none_or_named(tmp_path: Path) -> None:
    assert Picture.read_if_there(tmp_path) is None
    assert str(tmp_path / Picture.FILE_NAME) in message(tmp_path)


def test_a_new_version_is_written_and_refuses_the_one_before(tmp_path: Path) -> None:
    class NewPicture(Picture):
        VERSION: ClassVar[int] = 2

    picture = NewPicture("sea", Size(2, 3))
    picture.write(tmp_path)
    assert NewPicture.read(tmp_path) == picture
    assert "format_version is 2, but this program reads 1" in message(tmp_path)
