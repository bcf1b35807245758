"""Tagging a corpus gives the bits that preprocessing its text gives, and changes nothing of what Megatron wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools import inspect_data, merge_data, sample_data, tag_data
from data_tools.corpus.corpus import Corpus, CorpusPaths
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.manifest import Manifest, manifest_path
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.gpt_data import gpt_config, training_set
from tests.unit.data_tools.conftest import documents


def tag(prefix: Path | str, tokenizer: Path, *words: str | Path) -> None:
    kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
    call(tag_data.main, [*map(str, (prefix, *words)), "--tokenizer-type", kind, "--tokenizer-model", str(tokenizer)])


ROWS = documents(40)


def files_of(prefix: Path | str) -> dict[str, tuple[bytes, int]]:
    """Content and time of Megatron's two files."""
    paths = CorpusPaths.of(prefix)[:2]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    ("named", "bit"), [("el", "expanded"), ("ell_Grek", "expanded"), ("expanded", "expanded"), ("en", "original")]
)
@pytest.mark.parametrize("ends", ["--append-eod", ""])
def test_bits_are_those_of_preprocessing(named, bit, ends, tokenizer: Path, preprocess) -> None:
    """All that differs in the manifest is what only the text shows."""
    groups = () if named == bit else (f"--{bit}-languages", named)
    made = preprocess(ROWS, "--language", named, *groups, *ends.split(), tokenizer=tokenizer)
    prefix, expected = made.path(), made.manifest().as_json()
    lang = CorpusPaths.of(prefix).lang
    bits = lang.read_bytes()
    lang.unlink()
    manifest_path(prefix).unlink()
    before = files_of(prefix)
    tag(prefix, tokenizer, "--language", named, "--bit", bit, *([] if ends else ["--no-append-eod"]))
    assert lang.read_bytes() == bits
    assert files_of(prefix) == before
    for count in expected["languages"].values():
        count["bytes"] = 0
    source = {"path": f"{prefix}.bin", "bytes": expected["files"]["bin"]["bytes"], "sha1": None, "version": None}
    expected["sources"] = [source | {"documents": len(ROWS)}]
    assert made.manifest().as_json() == expected


@pytest.fixture
def megatrons(tmp_path: Path, hf_tokenizer: Path) -> Path:
    """A corpus by Megatron's builder, each document a sequence per sentence as with --split-sentences."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for row in ROWS:
        sentences = [tokenizer.encode_whole(sentence) for sentence in row["text"].split(",") if sentence]
        if sentences:
            sentences[-1].append(tokenizer.eod_id)
        builder.add_document(sum(sentences, []), [len(sentence) for sentence in sentences])
    builder.finalize(str(tmp_path / "m.idx"))
    return tmp_path / "m"


def test_a_corpus_of_megatron_is_read_by_tools_and_trainer(megatrons, hf_tokenizer, tmp_path, preprocess, capsys):
    before = files_of(megatrons)
    tag(megatrons, hf_tokenizer, "--language", "el", "--bit", "expanded")
    assert files_of(megatrons) == before
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m.bin", "m.idx", "m.lang", "m.manifest.json"]

    corpus, indexed = Corpus(megatrons), IndexedDataset(str(megatrons))
    corpus.verify()
    assert len(corpus.sequence_lengths) > corpus.num_documents
    for index in range(len(ROWS)):
        ids, bits = corpus.document(index)
        sequences = range(*indexed.document_indices[index : index + 2])
        assert ids.tolist() == [id for sequence in sequences for id in indexed[sequence].tolist()]
        assert not bits.any()

    call(inspect_data.main, [str(megatrons), "--json"])
    summary = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert summary["documents"] == len(ROWS) and "counts per language" in summary["verified"]
    inputs = [str(megatrons), preprocess(ROWS, "--language", "original", "--append-eod").path()]
    call(merge_data.main, ["--output-prefix", str(tmp_path / "all"), "--input", *inputs])
    assert Corpus(tmp_path / "all").verify().documents == 2 * len(ROWS)
    flags = ["--output-prefix", str(tmp_path / "sample"), "--expanded-documents", "3"]
    call(sample_data.main, ["--input", str(megatrons), *flags])
    assert Corpus(tmp_path / "sample").verify().documents == 3
    expanded = training_set(30, gpt_config([str(megatrons)]))
    assert not any(expanded[index]["is_original"].any() for index in range(30))
    refused("already exists", megatrons, hf_tokenizer, "--language", "en", "--bit", "original")
    tag(megatrons, hf_tokenizer, "--language", "en", "--bit", "original", "--overwrite")
    original = training_set(30, gpt_config([str(megatrons)]))
    assert all(original[index]["is_original"].all() for index in range(30))


EXPANDED = ("--language", "el", "--bit", "expanded")


def refused(message: str, prefix: Path, *arguments: Any) -> None:
    folder = prefix.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        tag(prefix, *arguments)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def write_ids(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    ("documents", "dtype", "message", "flags"),
    [
        ([[0, 5, 600, 1]], np.uint16, "tokens up to 600, .* own tokenizer", ()),
        ([[0, 5, 1]], np.int32, "int32 tokens", ()),
        ([[0, 5, 1], [5, 1]], np.uint16, "1 of 2 documents .* begin with 0; pass --tokenizer-hf-no-include", ()),
        ([[0, 5, 2], [0, 2], [0, 1], []], np.uint16, "2 of 3 documents .* end with 1; pass --eod-token", ()),
        ([[], []], np.uint16, "contains no tokens", ()),
        ([[0, 1]], np.uint16, "--eod-token <eod> is not in", ("--eod-token", "<eod>")),
        ([[0, 1]], np.uint16, "a code such as eu", ("--language", "Greek?")),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(documents, dtype, message, flags, hf_tokenizer, tmp_path):
    prefix = write_ids(tmp_path / "a", documents, dtype)
    refused(message, prefix, hf_tokenizer, *EXPANDED, *flags)


def test_flags_that_say_how_documents_begin_and_end_are_recorded(hf_tokenizer, tmp_path) -> None:
    prefix = write_ids(tmp_path / "a", [[5, 2], [0, 2]])
    tag(prefix, hf_tokenizer, *EXPANDED, "--no-append-eod", "--tokenizer-hf-no-include-special-tokens")
    manifest = Manifest.read(prefix)
    assert not manifest.append_eod and not manifest.tokenizer.special_tokens
