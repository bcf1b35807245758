"""inspect_data.py shows a corpus and finds files that do not belong together."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from benchmarks.common import write_corpus
from data_tools import inspect_data
from data_tools.corpus.corpus import Corpus
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.manifest import Manifest, manifest_path
from tests.unit.data_tools.conftest import write_mixed_corpus

TEXTS = ["Turn on the light in the kitchen.", "Ανάψτε το φως στην κουζίνα."]


@pytest.fixture
def prefix(sp_tokenizer: Path, tmp_path: Path) -> Path:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp_tokenizer))
    documents = zip(map(processor.encode, [*TEXTS, ""]), [True, False, True], strict=True)
    return write_corpus(tmp_path / "corpus", processor.get_piece_size(), documents)


@pytest.fixture
def flags(sp_tokenizer: Path) -> list[str]:
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(sp_tokenizer)]


def test_summary_shows_counts_text_and_bits(prefix: Path, flags: list[str], capsys: pytest.CaptureFixture) -> None:
    call(inspect_data.main, [str(prefix), *flags])
    out = capsys.readouterr().out
    lengths = Corpus(prefix).document_lengths
    assert f"[original 1–{lengths[0]}] {TEXTS[0]}" in out
    assert f"[expanded 1–{lengths[1]}] {TEXTS[1]}" in out
    assert "3 1 empty" in " ".join(out.split()) and "  no manifest: " in out


def test_json_and_text_agree(make_corpus: Callable, capsys: pytest.CaptureFixture) -> None:
    prefix = make_corpus("c", [("en", [1, 2, 3]), ("el", [4, 5]), ("hu", []), ("el", [6] * 9), ("en", [7])])
    call(inspect_data.main, [str(prefix), "--json", "--documents", "2"])
    actual = json.loads(capsys.readouterr().out)
    manifest = actual.pop("manifest")
    assert manifest["languages"]["el"] == {"bit": "expanded", "documents": 2, "tokens": 11, "bytes": 44}
    assert actual.pop("files") == {"bin": 30, "idx": 34 + 4 * 12 + 6 * 8, "lang": 66}
    assert [*actual.pop("tokens_per_document").values()] == [0, 2.0, 3.0, pytest.approx(7.8), 9]
    assert actual.pop("verified")[-2:] == ["checksums of all files", "counts per language"]
    assert actual.pop("shown") == [
        {"tokens": 3, "runs": [{"bit": "original", "from": 1, "to": 3, "text": "1 2 3", "is_cut": False}]},
        {"tokens": 2, "runs": [{"bit": "expanded", "from": 1, "to": 2, "text": "4 5", "is_cut": False}]},
    ]
    counts = {"sequences": 4, "documents": 5, "empty_documents": 1, "tokens": 15, "original_tokens": 4}
    counts |= {"largest_id": 7, "expanded_tokens": 11}
    assert actual == {"prefix": str(prefix), "dtype": "uint16"} | counts
    call(inspect_data.main, [str(prefix)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["made", "with", "HuggingFaceTokenizer", "hf,", "ended", "by", "token", "0,", "from", "1", "source"] in lines
    assert ["en", "original", "2", "4", "26.7%", "4.00"] in lines
    assert ["hu", "expanded", "1", "0", "0.0%", "–"] in lines


def test_runs_inside_a_document_are_shown_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    call(inspect_data.main, [f"{write_mixed_corpus(tmp_path / 'mixed', [1, 0, 1])}.manifest.json"])
    out = capsys.readouterr().out
    assert "[original 1–2] 0 1\n  [expanded 3–6] 2 3 4 5\n  [original 7–7] 6\n" in out


def test_manifest_of_another_corpus_is_reported(make_corpus: Callable) -> None:
    prefix = make_corpus("c", [("en", [1, 2, 3]), ("el", [4, 5])])
    whole = Manifest.read(prefix)

    def expect(message: str, **changes: object) -> None:
        dataclasses.replace(whole, **changes).write(prefix)
        with pytest.raises(UserError, match=message):
            call(inspect_data.main, [str(prefix)])

    expect("c contains 2 documents, .*c.manifest.json states 3", documents=3)
    expect("c contains 5 tokens, .* states 6", tokens=6)
    expect("c contains 5 tokens of all languages, .* states 3", languages={"en": whole.languages["en"]})
    as_expanded = {"en": dataclasses.replace(whole.languages["en"], bit="expanded"), "el": whole.languages["el"]}
    expect("c contains 3 original-language tokens, .* states 0", languages=as_expanded)
    files = whole.files
    expect("c.bin is damaged or", files={"idx": files["idx"], "lang": files["lang"]})
    expect("c.lang is damaged or", files=files | {"lang": dataclasses.replace(files["lang"], bytes=1)})
    whole.write(prefix)
    # A token id that is as good as another: only the manifest knows.
    damage(Path(f"{prefix}.bin"), b"\x02")
    with pytest.raises(UserError, match="c.bin is damaged or"):
        call(inspect_data.main, [str(prefix)])
    manifest_path(prefix).unlink()
    call(inspect_data.main, [str(prefix)])


def test_long_runs_are_cut_and_control_characters_escaped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Letters:
        vocab_size, eod_id = 256, None

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    write_corpus(tmp_path / "c", 256, [([65, 27, 10, *[66] * 1000], True)])
    document = inspect_data.show_document(Corpus(tmp_path / "c"), 0, Letters(), 30)
    inspect_data.print_document(document, 1, 1)
    out = capsys.readouterr().out
    assert r"A\x1b\n" + 27 * "B" + " …" in out and "\x1b" not in out


def damage(path: Path, value: bytes) -> None:
    """Change the first bytes."""
    path.write_bytes(value + path.read_bytes()[len(value) :])


def test_files_that_do_not_belong_together_are_reported(prefix: Path, flags: list[str]) -> None:
    """Damage is tested with the readers of each file."""
    with pytest.raises(UserError, match="--tokenizer-type and --tokenizer-model"):
        call(inspect_data.main, [str(prefix), *flags[:2]])
    damage(Path(f"{prefix}.bin"), b"\xff\xff")
    with pytest.raises(UserError, match="token ID 65,535, .* ends at"):
        call(inspect_data.main, [str(prefix), *flags])
