"""Long lines and long texts give the corpus that they would give if they fitted into memory."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from data_tools.corpus.corpus import Corpus
from data_tools.preprocessing import batches, long_documents
from data_tools.preprocessing.batches import FileRange, ReadCursor
from data_tools.preprocessing.long_documents import encode_long_text, without_long_strings
from data_tools.preprocessing.shares import Share
from moelpr.base.errors import UserError
from moelpr.data.manifest import Manifest
from moelpr.data.text.documents import BadLine
from moelpr.data.text.sources import open_source
from moelpr.data.tokenizers.base import Tokenizer as AnyTokenizer
from moelpr.data.tokenizers.libraries import HuggingFaceTokenizer, SentencePieceTokenizer

# How Qwen2's and Llama 3's tokenizers split text, except for the number of digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all pieces about a hundred times smaller."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 3000)
    for module in (batches, long_documents):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 10_000)
    monkeypatch.setattr(long_documents, "_LONG_STRING_BYTES", 500)
    monkeypatch.setattr(long_documents, "_BLOCK_BYTES", 700)
    monkeypatch.setattr(long_documents, "_WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(long_documents, "LONG_TEXT_CHARACTERS", 2000)


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
def test_long_lines_give_the_corpus_of_lines_in_memory(
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
    for module in (batches, long_documents):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1 << 30)
    monkeypatch.setattr(long_documents, "LONG_TEXT_CHARACTERS", 1 << 30)
    whole = preprocess(hf_tokenizer, "--input", path, *flags, out="whole/a")
    for name in ("text", "title", "validation_text", "validation_title"):
        assert corpus_bytes(f"{prefix}_{name}_document") == corpus_bytes(f"{whole}_{name}_document")
        ours, theirs = (Manifest.read(f"{where}_{name}_document") for where in (prefix, whole))
        assert ours is not None and theirs is not None
        assert (ours.languages, ours.sources) == (theirs.languages, theirs.sources)
    for name in ("a_validation_text.jsonl", "a_validation_title.jsonl"):
        assert (prefix.parent / name).read_bytes() == (whole.parent / name).read_bytes()
        assert "é" in (prefix.parent / name).read_text("utf-8") or "title" in name
    assert {path.name for path in prefix.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}


def test_long_lines_are_batches_of_their_own(rows, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    share = Share(open_source(str(path)), 0, path.stat().st_size)
    found = list(batches.Reader([share], [[]], None, tmp_path).batches(ReadCursor()))
    assert [batch.is_long_line for batch in found].count(True) == 4
    content = path.read_bytes()
    read = [item for batch in found for item in batch.items()]
    lines = [content[item.start : item.stop - 1] if isinstance(item, FileRange) else item for item in read]
    assert b"\n".join(lines) + b"\n" == content


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
def test_any_json_is_restored_from_its_parts(value, is_ascii, indent, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("json") / "a"
    content = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8")
    path.write_bytes(b"before" + content + b"after")
    left, strings = without_long_strings(FileRange(str(path), 6, 6 + len(content)))

    def restored(part: Any) -> Any:
        if isinstance(part, str):
            return "".join(strings[part].parts()) if part in strings else part
        if isinstance(part, list):
            return [restored(item) for item in part]
        return {restored(key): restored(item) for key, item in part.items()} if isinstance(part, dict) else part

    assert restored(json.loads(left)) == value
    assert len(left) <= len(content) or strings


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "' + b"a b " * 5000, "not JSON"),
        (b'{"text": "' + b"a b " * 5000 + b'\xe9"}', "invalid UTF-8 in a long text"),
        (b'{"text": "' + b"a b " * 5000 + b'\\ud800 "}', "a long text contains half a surrogate pair"),
        (b'{"text": "\\udc00' + b"a b " * 5000 + b'"}', "a long text contains half a surrogate pair"),
        (b'{"text": "' + b"a b " * 2000 + b"\\q" + b"a b " * 2000 + b'"}', "not JSON"),
        (
            b'{"text": "' + b"a b " * 2000 + b"\\ud800" + b"a b " * 2000 + b'"}',
            "a long text contains half a surrogate pair or an",
        ),
        (b'{"text": "' + b"a b " * 5000 + b"\x01" + b'"}', "not JSON"),
        (b'{"text": "' + b"a b " * 5000 + b'"', "not JSON"),
        (b'{"text": "' + b"a b " * 5000 + b'", "text": "b"}', 'the key "text"'),
        (b'{"texts": "' + b"a b " * 5000 + b'"}', 'the key "text"'),
        (b'{"text": ["' + b"a b " * 5000 + b'"]}', 'the key "text"'),
        (b'{"text": [' + b"1," * 10_000 + b"1]}", "a line of 20,014 bytes"),
        (bytes(20_000), "a line of 20,001 bytes, NUL bytes"),
    ],
)
def test_malformed_long_line_is_reported_and_can_be_skipped(line, message, preprocess, hf_tokenizer, tmp_path) -> None:
    good = b'{"text": "a good line"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    flags = ("--input", tmp_path / "a.jsonl", "--language", "original")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
        preprocess(hf_tokenizer, *flags)
    assert list((tmp_path / "out").iterdir()) == []
    prefix = preprocess(hf_tokenizer, *flags, "--on-error", "skip", "--max-bad-share", "0.5")
    assert Corpus(f"{prefix}_text_document").num_documents == 2


def test_long_blank_line_is_ignored(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b" " * 30_000 + b'\n{"text": "a"}\n')
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", "--language", "original")
    assert Corpus(f"{prefix}_text_document").num_documents == 1


def test_language_of_a_long_text_is_detected_in_its_first_part(preprocess, hf_tokenizer, write_lines, sentences):
    flags = ("--detect-language", "--original-languages", "en", "--expanded-languages", "el", "--audit")
    rows = [{"text": f"{sentences[name]} " * 400, "lang": name} for name in ("en", "el")]
    lines = write_lines("a.jsonl", rows)
    prefix = preprocess(hf_tokenizer, "--input", lines, *flags[:-1])
    corpus = Corpus(f"{prefix}_text_document")
    assert [set(corpus.document(index)[1].tolist()) for index in (0, 1)] == [{1}, {0}]
    with pytest.raises(UserError, match="a long text can't have a language for each of its lines"):
        # Only the first part is looked at, and it is English.
        rows[0]["text"] = "\n".join([sentences["en"]] * 300 + [sentences["el"]] * 300)
        by_line = ("--detect-language", "line", *flags[1:-1])
        preprocess(hf_tokenizer, "--input", write_lines("b.jsonl", rows), *by_line, out="other/a")


def test_long_mixed_document_is_encoded_in_pieces(
    preprocess, hf_tokenizer, write_lines, sentences, corpus_bytes, monkeypatch
):
    """Longer than a piece, though not than memory: spans and pieces together."""
    for module in (batches, long_documents):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1 << 30)
    spans = [{"text": f"{sentences[name]} ", "lang": name} for name in ("en", "el", "hu") * 100]
    lines = write_lines("a.jsonl", [{"spans": spans}])
    flags = ("--input", lines, "--spans-key", "spans", "--original-languages", "en,hu")
    monkeypatch.setattr(long_documents, "LONG_TEXT_CHARACTERS", 2000)
    prefix = preprocess(hf_tokenizer, *flags)
    monkeypatch.setattr(long_documents, "LONG_TEXT_CHARACTERS", 1 << 30)
    whole = preprocess(hf_tokenizer, *flags, out="whole/a")
    assert corpus_bytes(f"{prefix}_text_document") == corpus_bytes(f"{whole}_text_document")


def test_long_lines_that_were_not_chosen_take_no_disk(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path, spool = tmp_path / "a.jsonl", tmp_path / "spool"
    spool.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = Share(open_source(str(path)), 0, path.stat().st_size)
    sizes = [len(line) for line in path.read_bytes().splitlines(keepends=True)]
    long = [number for number, size in enumerate(sizes) if size > 10_000]
    chosen = [0, long[1], len(rows) - 2]
    found = list(batches.Reader([share], [["text"]], [np.array(chosen)], spool).batches(ReadCursor()))
    assert sum(batch.num_bytes for batch in found) == sum(sizes[number] for number in chosen)
    assert len(list(spool.iterdir())) == len({*chosen} & {*long}) < len(long)


def qwen_like(hf_tokenizer: Path) -> AnyTokenizer:
    tokenizer = Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return HuggingFaceTokenizer(tokenizer.to_str())


def metaspace() -> AnyTokenizer:
    """Llama 2's tokenizer in `tokenizers`: no words at all, and a space before the text."""
    vocabulary = {
        piece: id for id, piece in enumerate(["<unk>", "▁", *"abcdehiklmnoprtu.,\n", "▁t", "th", "in", "▁in"])
    }
    merges = [("▁", "t"), ("t", "h"), ("i", "n"), ("▁", "in")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return HuggingFaceTokenizer(tokenizer.to_str())


@pytest.fixture(params=["byte-level", "qwen", "metaspace", "sentencepiece"])
def backend(request: pytest.FixtureRequest, hf_tokenizer: Path, sp_tokenizer: Path) -> AnyTokenizer:
    if request.param == "byte-level":
        return HuggingFaceTokenizer((hf_tokenizer / "tokenizer.json").read_text())
    if request.param == "sentencepiece":
        return SentencePieceTokenizer(sp_tokenizer.read_bytes())
    return qwen_like(hf_tokenizer) if request.param == "qwen" else metaspace()


def random_text(sentences: dict[str, str], seed: int, characters: int) -> str:
    """Sentences of all languages with every kind of white space between them, and accents as their own characters."""
    rng = random.Random(seed)
    pieces: list[str] = []
    while sum(map(len, pieces)) < characters:
        pieces.append(rng.choice([*sentences.values(), "e\u0301 12345", "<s>", "don't", "—", "…  …", "\u3000"]))
        pieces.append(rng.choice([" ", " ", " ", "\n", "\n\n", "  ", " \n ", "\t", "", "\r\n"]))
    return "".join(pieces)


def in_pieces(backend: AnyTokenizer, parts: list[str]) -> list[np.ndarray]:
    return [piece.ids for piece in encode_long_text(backend, iter(parts))]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_have_the_ids_of_the_complete_text(seed: int, backend: AnyTokenizer, sentences: dict[str, str]) -> None:
    text = random_text(sentences, seed, 30_000)
    pieces = in_pieces(backend, [text])
    assert len(pieces) > 10
    np.testing.assert_array_equal(np.concatenate(pieces), backend.encode([text]).ids)


def test_tokens_do_not_depend_on_the_parts_of_a_text(backend: AnyTokenizer, sentences: dict[str, str]) -> None:
    text = random_text(sentences, 7, 12_000)
    rng = random.Random(1)
    parts: list[str] = []
    while (start := sum(map(len, parts))) < len(text):
        parts.append(text[start : start + rng.randint(1, 3000)])
    for ours, theirs in zip(in_pieces(backend, parts), in_pieces(backend, [text]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "text", ["", "a", "a b " * 499, "a b " * 500, "a b " * 501, "打开厨房的灯，in请关上门。" * 500]
)
def test_text_about_as_long_as_a_piece_or_without_spaces(text: str, backend: AnyTokenizer) -> None:
    np.testing.assert_array_equal(np.concatenate(in_pieces(backend, [text])), backend.encode([text]).ids)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_that_begin_inside_a_word_are_joined_where_they_agree(seed: int, hf_tokenizer: Path) -> None:
    """In "aaa…" tokens are pairs, counted from the word's start; a piece that begins inside may have all others."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2, "<unk>": 3}, [("a", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("b", "isolated")
    backend = HuggingFaceTokenizer(tokenizer.to_str())
    rng = random.Random(seed)
    text = "b".join("a" * rng.randint(1, 500) for _ in range(100))
    np.testing.assert_array_equal(np.concatenate(in_pieces(backend, [text])), backend.encode([text]).ids)


def test_text_on_which_pieces_never_agree_is_rejected(hf_tokenizer: Path) -> None:
    """For this tokenizer it is a single unknown token, however long."""
    with pytest.raises(BadLine, match="a text with 800 characters"):
        in_pieces(metaspace(), ["打" * 5000])


def test_long_document_is_one_document(hf_tokenizer: Path, sentences, write_lines, preprocess, monkeypatch) -> None:
    monkeypatch.setattr(long_documents, "LONG_TEXT_CHARACTERS", 2000)
    texts = ["short", random_text(sentences, 3, 10_000), "short"]
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    prefix = preprocess(hf_tokenizer, "--input", lines, "--language", "original", "--append-eod")
    corpus = Corpus(f"{prefix}_text_document")
    backend = HuggingFaceTokenizer((hf_tokenizer / "tokenizer.json").read_text())
    assert corpus.document(1)[0].tolist() == [0, *backend.encode([texts[1]]).ids.tolist(), 1]
    assert corpus.num_documents == 3
