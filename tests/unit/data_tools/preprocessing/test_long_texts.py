"""A text of any length has the ids it has as a whole, though it is encoded in pieces."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from data_tools.corpus import Corpus
from data_tools.preprocessing import long_texts
from data_tools.preprocessing.backends import Backend, HuggingFaceBackend, SentencePieceBackend
from data_tools.preprocessing.long_texts import encode_long_text
from moelpr.documents import BadLine

# What Qwen2's tokenizer and Llama 3's split text with, up to the number of digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG_TEXT_CHARACTERS", 2000)
    monkeypatch.setattr(long_texts, "_WINDOW_CHARACTERS", 100)


def qwen_like(hf_tokenizer: Path) -> Backend:
    tokenizer = Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return HuggingFaceBackend(tokenizer.to_str(), False)


def metaspace() -> Backend:
    """Llama 2's way in `tokenizers`: no words at all, and a space before the text."""
    vocabulary = {
        piece: id for id, piece in enumerate(["<unk>", "▁", *"abcdehiklmnoprtu.,\n", "▁t", "th", "in", "▁in"])
    }
    merges = [("▁", "t"), ("t", "h"), ("i", "n"), ("▁", "in")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return HuggingFaceBackend(tokenizer.to_str(), False)


@pytest.fixture(params=["byte-level", "qwen", "metaspace", "sentencepiece"])
def backend(request: pytest.FixtureRequest, hf_tokenizer: Path, sp_tokenizer: Path) -> Backend:
    if request.param == "byte-level":
        return HuggingFaceBackend((hf_tokenizer / "tokenizer.json").read_text(), False)
    if request.param == "sentencepiece":
        return SentencePieceBackend(sp_tokenizer.read_bytes())
    return qwen_like(hf_tokenizer) if request.param == "qwen" else metaspace()


def random_text(sentences: dict[str, str], seed: int, characters: int) -> str:
    """Sentences of all languages with every kind of white space between them, and accents as their own characters."""
    rng = random.Random(seed)
    pieces: list[str] = []
    while sum(map(len, pieces)) < characters:
        pieces.append(rng.choice([*sentences.values(), "e\u0301 12345", "<s>", "don't", "—", "…  …", "\u3000"]))
        pieces.append(rng.choice([" ", " ", " ", "\n", "\n\n", "  ", " \n ", "\t", "", "\r\n"]))
    return "".join(pieces)


def in_pieces(backend: Backend, parts: list[str]) -> list[np.ndarray]:
    return [piece.ids for piece in encode_long_text(backend, iter(parts))]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_have_the_ids_of_the_whole(seed: int, backend: Backend, sentences: dict[str, str]) -> None:
    text = random_text(sentences, seed, 30_000)
    pieces = in_pieces(backend, [text])
    assert len(pieces) > 10
    np.testing.assert_array_equal(np.concatenate(pieces), backend.encode([text]).ids)


def test_it_does_not_matter_in_which_parts_a_text_comes(backend: Backend, sentences: dict[str, str]) -> None:
    text = random_text(sentences, 7, 12_000)
    rng = random.Random(1)
    parts: list[str] = []
    while (start := sum(map(len, parts))) < len(text):
        parts.append(text[start : start + rng.randint(1, 3000)])
    for ours, theirs in zip(in_pieces(backend, parts), in_pieces(backend, [text]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("text", ["", "a", "a b " * 499, "a b " * 500, "a b " * 501])
def test_a_text_about_as_long_as_a_piece(text: str, backend: Backend) -> None:
    np.testing.assert_array_equal(np.concatenate(in_pieces(backend, [text])), backend.encode([text]).ids)


def test_a_text_without_spaces_is_encoded_all_the_same(backend: Backend) -> None:
    text = "打开厨房的灯，in请关上门。" * 500
    np.testing.assert_array_equal(np.concatenate(in_pieces(backend, [text])), backend.encode([text]).ids)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_that_begin_inside_a_word_are_taken_where_they_agree(seed: int, hf_tokenizer: Path) -> None:
    """In "aaa…" tokens are pairs, counted from the word's start; a piece that begins inside may have all others."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2, "<unk>": 3}, [("a", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("b", "isolated")
    backend = HuggingFaceBackend(tokenizer.to_str(), False)
    rng = random.Random(seed)
    text = "b".join("a" * rng.randint(1, 500) for _ in range(100))
    np.testing.assert_array_equal(np.concatenate(in_pieces(backend, [text])), backend.encode([text]).ids)


def test_a_text_on_which_pieces_never_agree_is_refused(hf_tokenizer: Path) -> None:
    """To this tokenizer it is a single unknown token, however long."""
    with pytest.raises(BadLine, match="a text with 800 characters without a place where the tokenizer begins afresh"):
        in_pieces(metaspace(), ["打" * 5000])


def test_a_long_document_is_one_document(hf_tokenizer: Path, sentences, write_lines, preprocess, monkeypatch) -> None:
    monkeypatch.setattr("data_tools.preprocessing.encoder.LONG_TEXT_CHARACTERS", 2000)
    texts = ["short", random_text(sentences, 3, 10_000), "short"]
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    prefix = preprocess(hf_tokenizer, "--input", lines, "--language", "original", "--append-eod")
    corpus = Corpus(f"{prefix}_text_document")
    backend = HuggingFaceBackend((hf_tokenizer / "tokenizer.json").read_text(), False)
    assert corpus.document(1)[0].tolist() == [0, *backend.encode([texts[1]]).ids.tolist(), 1]
    assert corpus.num_documents == 3
