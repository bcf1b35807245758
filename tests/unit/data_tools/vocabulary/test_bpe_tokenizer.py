import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.vocabulary.bpe_tokenizer import BpeTokenizer
from data_tools.vocabulary.merges import Character
from moelpr.base.errors import UserError

BYTES = {name: id for id, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}


def source_of(model: models.Model, is_byte_level: bool = True) -> str:
    tokenizer = Tokenizer(model)
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.to_str()


def fallback_tokenizer() -> BpeTokenizer:
    vocab = BYTE_TOKENS | {"▁": 256, "a": 257, "b": 258, "ab": 259, "▁ab": 260}
    model = models.BPE(vocab, [("a", "b"), ("▁", "ab")], byte_fallback=True)
    return BpeTokenizer(source_of(model, is_byte_level=False), "x")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (source_of(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "WordPiece"),
        (source_of(models.Unigram([("a", 0.0)], unk_id=0)), "Unigram"),
        (source_of(models.BPE(BYTES, [], dropout=0.1)), "dropout"),
        (source_of(models.BPE(BYTES, [], end_of_word_suffix="</w>")), "suffix"),
        (source_of(models.BPE({"a": 0}, []), is_byte_level=False), "not of bytes"),
        (source_of(models.BPE({"a": 0}, [], byte_fallback=True), is_byte_level=False), "lacks tokens"),
    ],
)
def test_other_kinds_are_refused(source: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        BpeTokenizer(source, "folder")


def test_characters_that_fall_back_to_bytes_are_symbols_of_their_own() -> None:
    tokenizer = fallback_tokenizer()
    assert tokenizer.symbols("▁abλабλ") == [260, -2, -3, -4, -2]
    assert tokenizer.characters[-2] == Character("λ", [0xCE, 0xBB])


def test_a_word_with_a_byte_that_has_no_token_is_not_used() -> None:
    without_b = {name: id for id, name in enumerate(sorted({*BYTES} - {"b"}))}
    tokenizer = BpeTokenizer(source_of(models.BPE(without_b, [])), "x")
    assert tokenizer.symbols("abc") == []
    assert tokenizer.symbols("ac") == [without_b["a"], without_b["c"]]


def test_sentencepiece_words_begin_with_a_space_and_join_only_letters() -> None:
    tokenizer = fallback_tokenizer()
    assert tokenizer.words("▁ab▁αβ́γ.▁▁x7") == ["▁ab", "▁αβ́γ", ".", "▁x", "7"]


def test_what_is_taken_whole_is_a_character_or_a_word() -> None:
    assert set(fallback_tokenizer().taken_whole("abλ")) == {"a", "b", "λ"}
    byte_level = BpeTokenizer(source_of(models.BPE(BYTES, [])), "x")
    assert not list(byte_level.taken_whole("a b"))
    ignoring = BpeTokenizer(source_of(models.BPE(BYTES, [], ignore_merges=True)), "x")
    assert list(ignoring.taken_whole("a b")) == ["a", "Ġb"]


def test_added_tokens_keep_their_ids_above_the_vocabulary_of_the_model() -> None:
    old = Tokenizer(models.BPE(BYTES, []))
    old.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    old.add_special_tokens(["<s>"])
    tokenizer = BpeTokenizer(old.to_str(), "x")
    assert tokenizer.first_new_id == 257
    extended = Tokenizer.from_str(tokenizer.extended([]))
    assert json.loads(extended.to_str())["model"]["vocab"]["<s>"] == 256
    assert extended.encode("a<s>b").ids == old.encode("a<s>b").ids
