"""inspect_data.py shows a corpus and finds files that don't belong together."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_tools import inspect_data
from data_tools.corpus import Corpus
from data_tools.corpus_writer import CorpusWriter
from moelpr.errors import UserError

TEXTS = ["Turn on the light in the kitchen.", "Ανάψτε το φως στην κουζίνα."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def prefix(tokenizer: Path, tmp_path: Path) -> Path:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    with CorpusWriter(tmp_path / "corpus", processor.get_piece_size()) as writer:
        for text, is_original in zip([*TEXTS, ""], [True, False, True], strict=True):
            writer.add_document(np.array(processor.encode(text), np.int32), is_original)
        writer.finalize()
        writer.commit()
    return tmp_path / "corpus"


def test_it_shows_counts_text_and_bits(prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    inspect_data.main([str(prefix), "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)])
    out = capsys.readouterr().out
    lengths = Corpus(prefix).document_lengths
    assert f"[original 1–{lengths[0]}] {TEXTS[0]}" in out
    assert f"[expanded 1–{lengths[1]}] {TEXTS[1]}" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["documents", "3", "1", "empty"] in lines
    assert ["tokens", f"{lengths.sum()}"] in lines
    assert ["original-language", f"{lengths[0]}", f"{lengths[0] / lengths.sum():.1%}"] in lines
    assert out.endswith("The three files agree: sizes, offsets, token count, checksum.\n")


def test_without_a_tokenizer_it_shows_ids(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    inspect_data.main([f"{prefix}.idx", "--documents", "1"])  # a file name completed by the shell will do
    out = capsys.readouterr().out
    assert f"[original 1–{len(Corpus(prefix).document(0)[0])}] {Corpus(prefix).document(0)[0][0]} " in out
    assert "document 2" not in out


def test_runs_are_the_ranges_of_equal_bits() -> None:
    assert inspect_data.runs(np.array([1, 1, 0, 1, 1], np.uint8)) == [(0, 2), (2, 3), (3, 5)]
    assert inspect_data.runs(np.zeros(0, np.uint8)) == []


def test_long_runs_are_cut_and_control_characters_escaped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Letters:
        vocab_size, eod_id = 256, None

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            raise NotImplementedError

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    with CorpusWriter(tmp_path / "c", 256) as writer:
        writer.add_document(np.array([65, 27, 10, *[66] * 1000], np.int32), True)
        writer.finalize()
        writer.commit()
    inspect_data.print_document(Corpus(tmp_path / "c"), 0, Letters(), 30)
    out = capsys.readouterr().out
    assert r"A\x1b\n" + 27 * "B" + " …" in out and "\x1b" not in out


def damage(path: Path, position: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


def test_files_that_do_not_belong_together_are_told_apart(prefix: Path, tokenizer: Path, tmp_path: Path) -> None:
    total = Corpus(prefix).bits.num_tokens

    def expect(message: str, change, flags: list[str] | None = None) -> None:
        copy = tmp_path / "copy"
        for suffix in (".bin", ".idx", ".lang"):
            shutil.copy(f"{prefix}{suffix}", f"{copy}{suffix}")
        change(copy)
        with pytest.raises(UserError, match=message):
            inspect_data.main([str(copy), *(flags or [])])

    expect(r"copy\.bin is missing; give a corpus prefix", lambda c: Path(f"{c}.bin").unlink())
    expect(r"copy\.lang is missing", lambda c: Path(f"{c}.lang").unlink())
    expect(
        rf"copy\.bin holds {2 * total + 1} bytes but \S*copy\.idx describes {2 * total} \({total} tokens of 2 bytes\)",
        lambda c: Path(f"{c}.bin").write_bytes(Path(f"{c}.bin").read_bytes() + b"\0"),
    )
    expect(
        r"copy\.idx is no whole Megatron \.idx file",
        lambda c: Path(f"{c}.idx").write_bytes(Path(f"{c}.idx").read_bytes()[:-1]),
    )
    expect(r"copy\.idx is no whole", lambda c: damage(Path(f"{c}.idx"), 0, b"X"))
    # 34 bytes of header, two lengths of 4 bytes, then the offsets.
    expect(r"its sequences do not follow each other", lambda c: damage(Path(f"{c}.idx"), 34 + 8, struct.pack("<q", 2)))
    expect(r"copy\.lang is damaged: checksum", lambda c: damage(Path(f"{c}.lang"), 64, b"\xaa"))

    def shorter(copy: Path) -> None:
        with CorpusWriter(copy, 100, overwrite=True) as writer:
            writer.add_document(np.arange(5, dtype=np.int32), True)
            writer.finalize()
            writer.commit()
        shutil.copy(f"{prefix}.lang", f"{copy}.lang")

    expect(rf"copy\.lang covers {total} tokens but \S*copy\.bin holds 5; rebuild both with", shorter)
    expect(
        "holds token id 65,535 but .* ends at",
        lambda c: damage(Path(f"{c}.bin"), 0, b"\xff\xff"),
        ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)],
    )
    expect("go together", lambda c: None, ["--tokenizer-type", "SentencePieceTokenizer"])
