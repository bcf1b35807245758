"""Lines that don't fit into memory give what they give where they do."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus import Corpus
from data_tools.preprocessing import long_lines, long_texts, readers
from data_tools.preprocessing.long_lines import without_long_strings
from data_tools.preprocessing.readers import LinesAt
from data_tools.preprocessing.sources import Share, open_source
from moelpr.data.manifest import Manifest
from moelpr.errors import UserError


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the sizes that pieces have in use."""
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    for module in (readers, long_lines):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 10_000)
    monkeypatch.setattr(long_lines, "_LONG_STRING_BYTES", 500)
    monkeypatch.setattr(long_lines, "_BLOCK_BYTES", 700)
    monkeypatch.setattr(long_texts, "_WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(long_texts, "LONG_TEXT_CHARACTERS", 2000)


def text(seed: int, sentences: dict[str, str], characters: int) -> str:
    rng = random.Random(seed)
    pieces: list[str] = []
    while sum(map(len, pieces)) < characters:
        pieces.append(rng.choice([*sentences.values(), 'say "yes" \\ no', "🙂 𝒳", "tab\there", "\x00\x1f/"]))
        pieces.append(rng.choice([" ", "\n", "\r\n\r\n"]))
    return "".join(pieces)


@pytest.fixture
def rows(sentences: dict[str, str]) -> list[dict[str, Any]]:
    sizes = [100, 30_000, 200, 50, 12_000, 9_000, 60_000]
    names = ("en", "el", "hu")
    return [
        {
            "before": [1, {"x": "y" * 3000}],
            "text": text(i, sentences, size),
            "lang": names[i % 3],
            "title": f"title {i}",
        }
        for i, size in enumerate(sizes)
    ]


FLAGS = ("--language-key", "lang", "--original-languages", "en", "--append-eod", "--json-keys", "text", "title")


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("is_archive", [True, False])
def test_long_lines_give_the_corpus_of_short_ones(
    is_ascii: bool,
    is_archive: bool,
    rows,
    preprocess,
    hf_tokenizer,
    corpus_bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = "".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(content) if is_archive else content)
    flags = (*FLAGS, "--validation-share", "0.4", "--seed", "3")
    prefix = preprocess(hf_tokenizer, "--input", path, *flags, workers=2)
    for module in (readers, long_lines):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1 << 30)
    monkeypatch.setattr("data_tools.preprocessing.encoder.LONG_TEXT_CHARACTERS", 1 << 30)
    whole = preprocess(hf_tokenizer, "--input", path, *flags, out="whole/a")
    for name in ("text", "title", "validation_text", "validation_title"):
        assert corpus_bytes(f"{prefix}_{name}_document") == corpus_bytes(f"{whole}_{name}_document")
        ours, theirs = (Manifest.read(f"{where}_{name}_document") for where in (prefix, whole))
        assert ours is not None and theirs is not None
        assert (ours.languages, ours.sources) == (theirs.languages, theirs.sources)
    assert {path.name for path in prefix.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}


def test_a_long_line_is_really_taken_for_one(rows, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    share = Share(open_source(str(path)), 0, path.stat().st_size)
    batches = list(readers.Reader([share], [[]], None, tmp_path).batches(readers.Place()))
    assert [batch.is_long_line for batch in batches].count(True) == 4
    assert all(len(batch.items()) == 1 for batch in batches if batch.is_long_line)
    assert b"\n".join(line for batch in batches for line in batch.items()) + b"\n" == path.read_bytes()


@settings(deadline=None, max_examples=100)
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=30)
        | st.text('aé🙂\\"\n', min_size=100, max_size=1200),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 3]),
)
def test_any_json_comes_back_from_its_parts(
    value: Any, is_ascii: bool, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "a"
    content = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8")
    path.write_bytes(b"before" + content + b"after")
    left, strings = without_long_strings(LinesAt(str(path), 6, 6 + len(content)))

    def restored(part: Any) -> Any:
        if isinstance(part, str):
            return "".join(strings[part].parts()) if part in strings else part
        if isinstance(part, list):
            return [restored(item) for item in part]
        return {restored(key): restored(item) for key, item in part.items()} if isinstance(part, dict) else part

    assert restored(json.loads(left)) == value
    assert len(left) <= len(content) or strings


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "' + b"a b " * 5000, r"not JSON \(Unterminated string\)"),
        (b'{"text": "' + b"a b " * 5000 + b'\xe9"}', "invalid UTF-8 in a long text"),
        (b'{"text": "' + b"a b " * 5000 + b'\\ud800 "}', "a long text holds half a surrogate pair"),
        (b'{"text": "\\udc00' + b"a b " * 5000 + b'"}', "a long text holds half a surrogate pair"),
        (b'{"text": "' + b"a b " * 2000 + b"\\q" + b"a b " * 2000 + b'"}', "not JSON"),
        (
            b'{"text": "' + b"a b " * 2000 + b"\\ud800" + b"a b " * 2000 + b'"}',
            "a long text holds half a surrogate pair or an esc",
        ),
        (b'{"text": "' + b"a b " * 5000 + b"\x01" + b'"}', "not JSON .Invalid control character"),
        (b'{"text": "' + b"a b " * 5000 + b'"', r"not JSON \(Expecting"),
        (b'{"text": "' + b"a b " * 5000 + b'", "text": "b"}', 'the key "text" stands there twice'),
        (b'{"texts": "' + b"a b " * 5000 + b'"}', 'the key "text" is missing'),
        (b'{"text": ["' + b"a b " * 5000 + b'"]}', 'the key "text" holds a list'),
        (b'{"text": [' + b"1," * 10_000 + b"1]}", "a line of 20,014 bytes, most of which is no long text"),
        (bytes(20_000), "a line of 20,001 bytes, NUL bytes"),
    ],
)
def test_a_broken_long_line_is_told_and_can_be_skipped(
    line: bytes, said: str, preprocess, hf_tokenizer, tmp_path: Path
) -> None:
    good = b'{"text": "a good line"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    flags = ("--input", tmp_path / "a.jsonl", "--language", "original")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {said}"):
        preprocess(hf_tokenizer, *flags)
    assert list((tmp_path / "out").iterdir()) == []
    prefix = preprocess(hf_tokenizer, *flags, "--on-error", "skip", "--max-bad-share", "0.5")
    assert Corpus(f"{prefix}_text_document").num_documents == 2


def test_a_long_blank_line_is_none(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b" " * 30_000 + b'\n{"text": "a"}\n')
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", "--language", "original")
    assert Corpus(f"{prefix}_text_document").num_documents == 1


def test_the_language_of_a_long_text_is_found_in_its_first_part(
    preprocess, hf_tokenizer, write_lines, sentences
) -> None:
    flags = ("--detect-language", "--original-languages", "en", "--expanded-languages", "el", "--audit")
    rows = [{"text": f"{sentences[name]} " * 400, "lang": name} for name in ("en", "el")]
    lines = write_lines("a.jsonl", rows)
    prefix = preprocess(hf_tokenizer, "--input", lines, *flags[:-1])
    corpus = Corpus(f"{prefix}_text_document")
    assert [set(corpus.document(index)[1].tolist()) for index in (0, 1)] == [{1}, {0}]
    with pytest.raises(UserError, match="a long text can't have a language for each of its lines"):
        rows[0]["text"] = "\n".join([sentences["en"], sentences["el"]] * 300)
        by_line = ("--detect-language", "line", *flags[1:-1])
        preprocess(hf_tokenizer, "--input", write_lines("b.jsonl", rows), *by_line, out="other/a")


def test_a_long_mixed_document_is_encoded_in_pieces(
    preprocess, hf_tokenizer, write_lines, sentences, corpus_bytes, monkeypatch
):
    """Longer than a piece, though not than memory: spans and pieces together."""
    for module in (readers, long_lines):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1 << 30)
    spans = [{"text": f"{sentences[name]} ", "lang": name} for name in ("en", "el", "hu") * 100]
    lines = write_lines("a.jsonl", [{"spans": spans}])
    flags = ("--input", lines, "--spans-key", "spans", "--original-languages", "en,hu")
    monkeypatch.setattr("data_tools.preprocessing.encoder.LONG_TEXT_CHARACTERS", 2000)
    prefix = preprocess(hf_tokenizer, *flags)
    monkeypatch.setattr("data_tools.preprocessing.encoder.LONG_TEXT_CHARACTERS", 1 << 30)
    whole = preprocess(hf_tokenizer, *flags, out="whole/a")
    assert corpus_bytes(f"{prefix}_text_document") == corpus_bytes(f"{whole}_text_document")
