"""Documents are read from every form of file in one order, and a message names the line of an unusable one."""

import json
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.data.text.reading import read_documents
from tests.support.packed_files import PACK


@pytest.mark.parametrize("suffix", PACK)
def test_every_form_of_a_file_and_its_folder_have_the_same_documents(suffix: str, tmp_path: Path) -> None:
    texts = [f"text\u2028 {number}" for number in range(300)]
    path = tmp_path / "folder" / f"a.{suffix}"
    path.parent.mkdir()
    lines = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts)
    path.write_bytes(PACK[suffix](lines.encode()))
    assert read_documents(path) == read_documents(path.parent) == read_documents(f"{path.parent}/*") == texts
    assert read_documents(path, max_documents=7) == texts[:7]
    with pytest.raises(UserError, match=f'{path.name}.*"?body'):
        read_documents(path, "body")
    if suffix != "jsonl":
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(UserError, match=f"{path.name} .* is damaged or truncated"):
            read_documents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "not JSON"),
        (b'{"txt": "no"}', 'no key "text" .keys: txt.*--json-key'),
        (b'{"text": 5}', "a number"),
        (b'{"text": ""}', "empty"),
    ],
)
def test_read_documents_names_the_malformed_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"{path}, line 2.*{message}"):
        read_documents(path)


def test_missing_and_empty_files_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path / "missing"):
        with pytest.raises(UserError, match=f"{path}.* can't be read"):
            read_documents(path)
    (tmp_path / "packed.jsonl.gz").write_text("no gzip")
    with pytest.raises(UserError, match="packed.jsonl.gz is damaged, or only a pointer of Git LFS; fetch it again"):
        read_documents(tmp_path / "packed.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl contains no documents"):
        read_documents(tmp_path / "empty.jsonl")
