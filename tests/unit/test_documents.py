"""What real crawls hold: each kind is decided, and told with its place."""

import pytest

from moelpr.documents import BadLine, parse, text_of


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "a", "text": "b"}', 'the key "text" stands there twice'),
        (b'{"text": "a", "text": "a"}', 'the key "text" stands there twice'),
        (b'{"text": "a\0b"}', "NUL bytes, as in a file that was not written to its end"),
        (b"\0" * 50, "NUL bytes"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 14 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 11 of the line"),
        (b'{"text": "a', "not JSON .Unterminated string"),
        (b"{'text': 'a'}", "not JSON"),
        (b'"text"', "a JSON object was expected, found a string"),
        (b"1" * 5000, "not usable JSON"),
    ],
)
def test_a_line_that_is_no_document(line: bytes, said: str) -> None:
    with pytest.raises(BadLine, match=said):
        parse(line, ["text"])


def test_what_is_odd_and_yet_a_document() -> None:
    assert parse(b'\xef\xbb\xbf{"text": "a"}\r\n', ["text"]) == {"text": "a"}
    assert text_of(parse(b'{"text": "a\\u0000b"}', ["text"]), "text") == "a\0b"
    assert text_of(parse(b'{"text": "\\ud83d\\ude42 ok"}', ["text"]), "text") == "🙂 ok"
    # Twice, but not the key of the text; or not as a key.
    assert parse(b'{"text": "a", "n": 1, "n": 2}', ["text"])["n"] == 2
    assert parse(rb'{"text": "say \"text\" and \"text\""}', ["text"])["text"] == 'say "text" and "text"'
    assert parse(b'{"text": "a", "tags": ["text"]}', ["text"])["text"] == "a"


@pytest.mark.parametrize(
    "document, said",
    [
        ({}, 'the key "text" is missing'),
        ({"text": None}, 'the key "text" holds null, not a string'),
        ({"text": True}, "holds a boolean"),
        ({"text": ["a"]}, "holds a list"),
        ({"text": {}}, "holds an object"),
        ({"text": b"a"}, "holds a value of another type"),
        ({"text": "ab\udc80"}, 'the key "text" holds half a surrogate pair at character 3'),
    ],
)
def test_a_document_without_a_text(document: dict, said: str) -> None:
    with pytest.raises(BadLine, match=said):
        text_of(document, "text")
