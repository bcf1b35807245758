import pytest

from moelpr.documents import read_documents
from moelpr.errors import UserError


def test_reads_texts_in_order_and_stops_at_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "eins"}\n\n{"text": "zwei", "x": 1}\n{"text": "drei"}')
    assert read_documents(path) == ["eins", "zwei", "drei"]
    assert read_documents(path, max_documents=2) == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "half', "line 2 is not JSON"),
        (b'{"txt": "no"}', r'line 2 has no "text" \(found: keys txt\)'),
        (b'["text"]', 'line 2 has no "text"'),
        (b'{"text": 5}', "line 2.*is int"),
        (b'{"text": ""}', "line 2.*empty"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
        (b'{"text": "\\ud83d"}', "line 2 holds half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=complaint) as error:
        read_documents(path)
    assert str(path) in str(error.value)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_documents(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_documents(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no documents"):
        read_documents(tmp_path / "empty.jsonl")
