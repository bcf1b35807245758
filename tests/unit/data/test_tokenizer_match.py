"""A corpus's tokenizer is recognized wherever it was saved."""

from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from moelpr.data.manifest import TokenizerRecord
from moelpr.data.tokenizer_match import TokenizerMatch, compare_tokenizers
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.hf_models import save_extended_tokenizer, save_tokenizer
from tests.support.small_tokenizers import byte_level_bpe, train_sentencepiece

LIGHT = ["turn on the light"] * 5


def record(kind: str, path: Path) -> TokenizerRecord:
    tokenizer = load_tokenizer(kind, str(path))
    return TokenizerRecord.of(kind, str(path), tokenizer, tokenizer.eod_id, True)


def test_different_tokens_are_distinguished_from_different_splitting(save_hf, tmp_path: Path) -> None:
    corpus = record("HuggingFaceTokenizer", save_hf(tmp_path / "a", byte_level_bpe(LIGHT)))
    other = save_hf(tmp_path / "other", byte_level_bpe(["Ανάψτε το φως"] * 5))
    assert compare_tokenizers(corpus, other) is TokenizerMatch.DIFFERENT

    lowercase = byte_level_bpe(LIGHT)
    lowercase.normalizer = normalizers.Lowercase()
    assert compare_tokenizers(corpus, save_hf(tmp_path / "lower", lowercase)) is TokenizerMatch.SAME_TOKENS
    extended = byte_level_bpe(LIGHT)
    extended.add_tokens(["<new>"])
    assert compare_tokenizers(corpus, save_hf(tmp_path / "extended", extended)) is TokenizerMatch.SAME_TOKENS

    (tmp_path / "empty").mkdir()
    assert compare_tokenizers(corpus, tmp_path / "empty") is TokenizerMatch.UNKNOWN
    assert compare_tokenizers(corpus, tmp_path / "none") is TokenizerMatch.UNKNOWN


def test_a_corpus_of_the_tokenizer_before_its_extension_is_not_one_with_the_same_tokens(tmp_path: Path) -> None:
    """Its IDs are all in the extended tokenizer, but it has none of the new ones."""
    save_tokenizer(old := tmp_path / "old", num_ids=20)
    corpus = record("HuggingFaceTokenizer", old)
    new = save_extended_tokenizer(old, tmp_path / "new", [("b", "b"), ("bb", "a")])
    assert compare_tokenizers(corpus, new) is TokenizerMatch.NOT_EXTENDED
    assert compare_tokenizers(record("HuggingFaceTokenizer", new), new) is TokenizerMatch.SAME
    assert compare_tokenizers(record("HuggingFaceTokenizer", new), old) is TokenizerMatch.DIFFERENT
    # Extended once more, with a corpus of each earlier tokenizer.
    third = save_extended_tokenizer(new, tmp_path / "third", [("b", "a")])
    for earlier in (old, new):
        assert compare_tokenizers(record("HuggingFaceTokenizer", earlier), third) is TokenizerMatch.NOT_EXTENDED


def test_sentencepiece_fingerprint_depends_on_what_affects_ids(tmp_path: Path) -> None:
    first = train_sentencepiece(tmp_path / "first", LIGHT, 40)
    folder = tmp_path / "hf"
    folder.mkdir()
    proto = ModelProto.FromString(first.read_bytes())
    proto.trainer_spec.input.append("elsewhere.txt")
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    corpus = record("SentencePieceTokenizer", first)
    assert compare_tokenizers(corpus, folder) is TokenizerMatch.SAME
    proto.normalizer_spec.add_dummy_prefix = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert compare_tokenizers(corpus, folder) is TokenizerMatch.SAME_TOKENS
    other = train_sentencepiece(tmp_path / "other", ["kapcsolja fel a lámpát"] * 5, 40)
    (folder / "tokenizer.model").write_bytes(other.read_bytes())
    assert compare_tokenizers(corpus, folder) is TokenizerMatch.DIFFERENT


def test_sentencepiece_corpus_matches_the_tokenizer_json_made_from_its_model(save_hf, tmp_path):
    """The two are different programs; only the tokens of each ID can be compared."""
    first = train_sentencepiece(tmp_path / "first", LIGHT, 40)
    pieces = [(piece.piece, piece.score) for piece in ModelProto.FromString(first.read_bytes()).pieces]
    converted = Tokenizer(models.Unigram(pieces, unk_id=0))
    converted.pre_tokenizer = pre_tokenizers.Metaspace()
    folder = save_hf(tmp_path / "hf", converted, pad_token="<pad>")  # a token behind those of the model
    assert compare_tokenizers(record("SentencePieceTokenizer", first), folder) is TokenizerMatch.SAME_TOKENS
