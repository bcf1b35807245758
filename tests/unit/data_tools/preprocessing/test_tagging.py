"""A token has the bit of the span that contains its first byte; languages are stated or detected, and audited."""

import re
from pathlib import Path

import numpy as np
import pytest

from moelpr.base.errors import UserError
from moelpr.data.text.language_id import UNDETECTED, Detector
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.unit.data_tools.conftest import SENTENCES
from tests.unit.data_tools.preprocessing.conftest import spans

LANGUAGES = ("--original-languages", "en,es,zh", "--expanded-languages", "el,hu")
SPANS = ("--spans-key", "spans", *LANGUAGES)
MIXED = [
    spans(("Turn on ", "en"), ("το φως", "el"), (" in the kitchen", "en"), (" ", "el"), ("a lámpát", "hu")),
    spans(*zip(("Enciende", " la luz", "", "打开", "厨房", "🙂", "🙂"), "es hu el zh el zh hu".split(), strict=True)),
    spans(("one language", "en"), (" only", "en")),
    spans(),
    spans(("", "en")),
]


def test_each_byte_level_token_has_the_bit_of_its_first_byte(hf_tokenizer: Path, preprocess) -> None:
    """A byte-level token's bytes are known, so adding up lengths says where each begins: no offsets are needed."""
    corpus = preprocess(MIXED, *SPANS, "--append-eod").corpus()
    names = names_in("HuggingFaceTokenizer", hf_tokenizer)
    for index, document in enumerate(MIXED[:3]):
        spans = document["spans"]
        bit_of_byte = [int(span["lang"] in ("en", "es", "zh")) for span in spans for _ in span["text"].encode()]
        ids, bits = corpus.document(index)
        pieces = [names[int(id)] for id in ids[1:-1]]  # without <s> and </s>
        starts = np.cumsum([0, *map(len, pieces)])[:-1]  # byte-level: a character per byte
        assert sum(map(len, pieces)) == len(bit_of_byte)
        expected = [bit_of_byte[start] for start in starts]
        assert bits.tolist() == [expected[0], *expected, expected[-1]]
    assert 0 < corpus.bits.num_original < corpus.bits.num_tokens


def names_in(kind: str, tokenizer: Path) -> dict[int, str]:
    return {id: token for token, id in load_tokenizer(kind, str(tokenizer)).vocabulary().items()}


def test_each_sentencepiece_token_has_the_bit_of_its_first_byte(sp_tokenizer: Path, preprocess) -> None:
    """Here a space is in the token that follows it, and the first one is not in the text."""
    document = spans(("Turn on ", "en"), ("το φως", "el"), (" in", "en"))
    ids, bits = preprocess([document], *SPANS, tokenizer=sp_tokenizer).corpus().document(0)
    names = names_in("SentencePieceTokenizer", sp_tokenizer)
    position, expected = 0, []
    text = "▁Turn▁on▁το▁φως▁in"
    bit = [1] * len("▁Turn▁on▁") + [0] * len("το▁φως") + [1] * len("▁in")
    for id in ids.tolist():
        assert text.startswith(names[id], position)
        expected.append(bit[position])
        position += len(names[id])
    assert bits.tolist() == expected and position == len(text)
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(sp_tokenizer))
    assert ids.tolist() == tokenizer.encode([text.replace("▁", " ").strip()]).ids.tolist()


def test_counts_per_language_are_those_of_the_spans(preprocess) -> None:
    made = preprocess(MIXED, *SPANS, "--append-eod")
    manifest, corpus = made.manifest(), made.corpus()
    original = sum(count.tokens for count in manifest.languages.values() if count.bit == "original")
    assert original == corpus.bits.num_original
    assert sum(count.tokens for count in manifest.languages.values()) == corpus.bits.num_tokens == manifest.tokens
    for name in ("en", "es", "zh", "el", "hu"):
        texts = [[span["text"] for span in document["spans"] if span["lang"] == name] for document in MIXED]
        assert manifest.languages[name].bytes == sum(len("".join(actual).encode()) for actual in texts)
        assert manifest.languages[name].documents == sum(any(actual) for actual in texts)


def test_language_of_documents_is_detected(preprocess, capsys) -> None:
    documents = [{"text": SENTENCES[name]} for name in ("en", "el", "zh", "hu", "es")] + [{"text": "12 34 — 56"}]
    made = preprocess(documents, "--detect-language", *LANGUAGES)
    assert [int(made.corpus().document(index)[1].max()) for index in range(6)] == [1, 0, 1, 0, 1, 0]
    counts = {name: count.documents for name, count in made.manifest().languages.items()}
    assert counts == dict.fromkeys(("en", "es", "zh", "el", "hu", UNDETECTED), 1)
    assert re.search(r"und +expanded +1 ", capsys.readouterr().out)


@pytest.mark.parametrize("choice, found", [("original", [1, 1]), ("expanded", [1, 0]), ("skip", [1])])
def test_undetected_sets_the_bit_of_uncertain_documents(choice: str, found: list[int], preprocess, capsys) -> None:
    documents = [{"text": SENTENCES["en"]}, {"text": "12 34 — 56"}]
    corpus = preprocess(documents, "--detect-language", *LANGUAGES, "--undetected", choice).corpus()
    assert [int(corpus.document(index)[1].max()) for index in range(corpus.num_documents)] == found
    assert ("1 documents of uncertain language" in capsys.readouterr().out) == (choice == "skip")


def test_language_of_lines_is_detected(preprocess, hf_tokenizer: Path) -> None:
    english = "They bought new furniture yesterday.", "Which window should we open?", "Nothing else was said about it."
    text = "\n".join([*english, SENTENCES["el"], "12 34", *reversed(english), SENTENCES["en"]])
    made = preprocess([{"text": text}], "--detect-language", "line", *LANGUAGES)
    manifest = made.manifest()
    assert set(manifest.languages) == {"en", "el"}  # the numbers take the whole document's
    assert manifest.languages["el"].bytes == len(f"{SENTENCES['el']}\n".encode())
    ids, bits = made.corpus().document(0)
    greek = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer)).decode(ids[bits == 0].tolist())
    assert greek.strip() == SENTENCES["el"]


def test_with_two_languages_a_text_without_letters_is_uncertain() -> None:
    """Then each has probability 1/2, the default of --min-confidence; Serbian has two scripts, and so 2/3."""
    for other in ("hu", "sr"):
        detector = Detector(frozenset({"en", other}), 0.5)
        assert detector.language(SENTENCES["en"]) == "en"
        assert [detector.language(text) for text in ("", "12 34", "---", "\n")] == [UNDETECTED] * 4
    assert Detector(frozenset({"en", "hu"}), 0.5).language(SENTENCES["hu"]) == "hu"


def test_audit_counts_stated_against_detected_languages(preprocess, capsys) -> None:
    stated = [("en", "en"), ("en", "el"), ("el", "el"), ("el", "el"), ("hu", "es")]
    documents = [{"text": SENTENCES[actual], "lang": name} for name, actual in stated]
    flags = ("--language-key", "lang", *LANGUAGES)
    plain = preprocess(documents, *flags)
    capsys.readouterr()
    audited = preprocess(documents, *flags, "--audit", out="audited/a")
    assert audited.content() == plain.content()
    out = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(out) if "by stated language" in line)
    assert [line.split() for line in out[start + 1 : start + 5]] == [
        ["el", "en", "es", "others"],
        ["el", "2", "0", "0", "0"],
        ["en", "1", "1", "0", "0"],
        ["hu", "0", "0", "1", "0"],
    ]
    assert "2 of 5 documents (40.00%) would have the other bit" in out[start + 5]
    # Spanish is expanded if only English is original; of one language there are no bits to count.
    others = "--language-key lang --original-languages en".split(), ["--language", "expanded"]
    for words, are_counted in zip(others, (True, False), strict=True):
        preprocess(documents, *words, "--audit", "--overwrite")
        printed = capsys.readouterr().out
        assert "by stated language" in printed and ("the other bit" in printed) == are_counted
        assert ("1 of 5 documents (20.00%)" in printed) == are_counted


def test_kept_text_is_original_has_its_own_name_and_is_checked(preprocess, capsys) -> None:
    documents = [{"text": SENTENCES[name]} for name in ("en", "es", "el", "en")]
    made = preprocess(documents, "--language", "kept", "--expanded-languages", "el,hu")
    assert "warning: 1 of 4 kept documents (25.0%) seem to be in expanded languages (el)" in capsys.readouterr().err
    bits, languages = made.corpus().bits, made.manifest().languages
    assert bits.num_original == bits.num_tokens
    assert [(name, x.bit, x.documents) for name, x in languages.items()] == [("kept", "original", 4)]
    preprocess(documents, "--language", "kept", out="unchecked/a")
    assert "kept documents" not in capsys.readouterr().err


def test_missing_py3langid_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    with pytest.raises(UserError, match="py3langid is not installed"):
        Detector(frozenset(), 0.5)
