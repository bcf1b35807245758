"""Whole jobs on unusual documents: what reaches the corpus, its manifest and its validation part."""

import json
from pathlib import Path

import pytest

from data_tools.corpus import Corpus
from moelpr.data.manifest import Manifest
from moelpr.errors import UserError

FLAGS = ("--language", "original", "--append-eod")


def test_white_space_and_empty_texts_are_documents(tokenizer: Path, write_lines, preprocess, capsys) -> None:
    """Even if the tokenizer makes no tokens of them."""
    texts = [" ", "\n\n\t", "\u3000", "a", "", "x" * 100_000]
    prefix = preprocess(tokenizer, "--input", write_lines("a.jsonl", [{"text": text} for text in texts]), *FLAGS)
    assert Corpus(f"{prefix}_text_document").num_documents == len(texts)


def test_nul_characters_and_emoji_are_preserved(hf_tokenizer: Path, write_lines, preprocess) -> None:
    from moelpr.data.tokenizer import load_tokenizer

    texts = ["a\0b", "\0", "👩‍👩‍👧‍👦", "\ufeff", "\U0010ffff"]
    prefix = preprocess(hf_tokenizer, "--input", write_lines("a.jsonl", [{"text": text} for text in texts]), *FLAGS)
    corpus, tokenizer = Corpus(f"{prefix}_text_document"), load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    decoded = [tokenizer.decode(corpus.document(index)[0][1:-1].tolist()) for index in range(len(texts))]
    assert decoded == texts


def test_malformed_lines_are_counted_and_listed(
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


def test_validation_takes_about_its_share_and_always_the_same_documents(
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


def test_a_validation_share_without_a_document_is_rejected(
    hf_tokenizer: Path, write_lines, preprocess, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a_validation_text_document would be without any text; look at"):
        lines = write_lines("a.jsonl", [{"text": "a"}])
        preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--validation-share", "0.0001")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_manifest_records_sources_and_outputs(hf_tokenizer: Path, write_lines, preprocess, tmp_path: Path) -> None:
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
