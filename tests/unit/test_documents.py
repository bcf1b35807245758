"""What real crawls hold: each kind is decided, and told with its place."""

import json
from pathlib import Path

import pytest

from data_tools.corpus import Corpus
from moelpr.data.manifest import Manifest
from moelpr.documents import BadLine, parse, text_of
from moelpr.errors import UserError

FLAGS = ("--language", "original", "--append-eod")


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


def test_white_space_is_text_and_nothing_is_none(tokenizer: Path, write_lines, preprocess, capsys) -> None:
    """A tokenizer may make nothing of it; the document is there all the same."""
    texts = [" ", "\n\n\t", "\u3000", "a", "", "x" * 100_000]
    prefix = preprocess(tokenizer, "--input", write_lines("a.jsonl", [{"text": text} for text in texts]), *FLAGS)
    assert Corpus(f"{prefix}_text_document").num_documents == len(texts)


def test_nul_characters_and_emoji_come_through(hf_tokenizer: Path, write_lines, preprocess) -> None:
    from moelpr.data.tokenizer import load_tokenizer

    texts = ["a\0b", "\0", "👩‍👩‍👧‍👦", "\ufeff", "\U0010ffff"]
    prefix = preprocess(hf_tokenizer, "--input", write_lines("a.jsonl", [{"text": text} for text in texts]), *FLAGS)
    corpus, tokenizer = Corpus(f"{prefix}_text_document"), load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    decoded = [tokenizer.decode(corpus.document(index)[0][1:-1].tolist()) for index in range(len(texts))]
    assert decoded == texts


def test_broken_lines_are_counted_and_all_of_them_listed(
    hf_tokenizer: Path, preprocess, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [b"broken %d" % i if i % 50 == 0 else b'{"text": "a"}' for i in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    flags = (*FLAGS, "--on-error", "skip", "--max-bad-share", "0.02")
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", *flags)
    manifest = Manifest.read(f"{prefix}_text_document")
    assert manifest is not None and (manifest.documents, manifest.skipped_lines) == (980, 20)
    listed = (tmp_path / "out" / "a.skipped.txt").read_text().splitlines()
    assert [int(line.split(":")[1]) for line in listed] == list(range(1, 1001, 50))
    said = capsys.readouterr().err
    assert "warning: 20 lines were skipped (2.00%), listed in " in said and "  and 10 more" in said

    with pytest.raises(UserError, match="20 of 1,000 lines are broken, more than --max-bad-share 0.019"):
        flags = (*FLAGS, "--on-error", "skip", "--max-bad-share", "0.019")
        preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", *flags, out="refused/a")
    assert list((tmp_path / "refused").iterdir()) == []


def test_validation_takes_about_its_share_and_always_the_same(
    hf_tokenizer: Path, write_lines, preprocess, corpus_bytes, tmp_path: Path
) -> None:
    texts = [f"document {i % 1500}" for i in range(2000)]  # 500 of them twice
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    backwards = write_lines("b.jsonl", [{"text": text} for text in reversed(texts)])

    def parts(path: Path, seed: int, out: str) -> list[list[bytes]]:
        flags = (*FLAGS, "--validation-share", "0.1", "--seed", seed)
        prefix = preprocess(hf_tokenizer, "--input", path, *flags, out=out)
        corpora = [Corpus(f"{prefix}_{name}_document") for name in ("text", "validation_text")]
        return [[corpus.document(i)[0].tobytes() for i in range(corpus.num_documents)] for corpus in corpora]

    train, validation = parts(lines, 1, "one/a")
    assert len(train) + len(validation) == 2000 and 140 < len(validation) < 260
    assert not set(train) & set(validation)  # copies of a text are on one side
    assert parts(backwards, 1, "back/a") == [train[::-1], validation[::-1]]
    assert set(parts(lines, 2, "other/a")[1]) != set(validation)
    whole = preprocess(hf_tokenizer, "--input", lines, *FLAGS, out="whole/a")
    corpus = Corpus(f"{whole}_text_document")
    rest = iter([corpus.document(i)[0].tobytes() for i in range(2000)])
    assert [text for text in rest if text not in set(validation)] == train


def test_a_validation_share_without_a_document_is_refused(
    hf_tokenizer: Path, write_lines, preprocess, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a_validation_text_document would be without any text; look at"):
        lines = write_lines("a.jsonl", [{"text": "a"}])
        preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--validation-share", "0.0001")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_manifest_tells_what_was_made_of_what(hf_tokenizer: Path, write_lines, preprocess, tmp_path: Path) -> None:
    import hashlib

    lines = write_lines("a.jsonl", [{"text": "ä b"}, {"text": ""}])
    prefix = preprocess(hf_tokenizer, "--input", lines, *FLAGS)
    manifest = Manifest.read(f"{prefix}_text_document")
    assert manifest is not None
    assert manifest.tokenizer.fingerprint.startswith("huggingface:") and manifest.append_eod
    assert [(s.path, s.bytes, s.documents) for s in manifest.sources] == [(str(lines), lines.stat().st_size, 2)]
    assert manifest.languages["original"].bytes == 4
    for name, record in manifest.files.items():
        content = Path(f"{prefix}_text_document.{name}").read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert json.loads((tmp_path / "out/a_text_document.manifest.json").read_text())["format_version"] == 1
