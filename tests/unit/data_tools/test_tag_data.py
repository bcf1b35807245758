"""Tagging a corpus gives the bits that preprocessing its text gives, and changes nothing of what Megatron wrote."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools import inspect_data, merge_data, sample_data, tag_data
from data_tools.corpus.corpus import Corpus, CorpusPaths
from data_tools.tagging.tokens import read_tokens
from moelpr.base.errors import UserError
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.manifest import Manifest, manifest_path
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.gpt_data import gpt_config, training_set

KEY = ("--language-key", "lang", "--original-languages", "en,es,zh")


def tag(prefix: Path | str, tokenizer: Path, *words: str | Path) -> None:
    kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
    tag_data.main([*map(str, (prefix, *words)), "--tokenizer-type", kind, "--tokenizer-model", str(tokenizer)])


@pytest.fixture
def rows(sentences: dict[str, str]) -> list[dict[str, str]]:
    """Documents of all languages, one in four of them empty."""
    names = list(sentences)
    return [{"text": " ".join([sentences[names[i % 5]]] * (i % 4)), "lang": names[i % 5]} for i in range(40)]


def write_languages(path: Path, languages: list[str]) -> Path:
    path.write_text("".join(f"{language}\n" for language in languages))
    return path


def files_of(prefix: Path | str) -> dict[str, tuple[bytes, int]]:
    """Content and time of Megatron's two files."""
    paths = CorpusPaths.of(prefix)[:2]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("ends", ["--append-eod", ""])
def test_bits_are_those_of_preprocessing(ends, tokenizer, rows, write_lines, preprocess, tmp_path) -> None:
    """All that differs in the manifest is what only the text shows."""
    prefix = f"{preprocess(tokenizer, '--input', write_lines('a.jsonl', rows), *KEY, *ends.split())}_text_document"
    lang, expected = CorpusPaths.of(prefix).lang, Manifest.read(prefix)
    bits = lang.read_bytes()
    lang.unlink()
    manifest_path(prefix).unlink()
    before = files_of(prefix)
    codes = {"en": "eng_Latn", "el": "ell"}
    languages = write_languages(tmp_path / "languages", [codes.get(row["lang"], row["lang"]) for row in rows])
    flags = ("--document-languages", languages, "--original-languages", "en,es,zh")
    tag(prefix, tokenizer, *flags, ends or "--no-append-eod")
    assert lang.read_bytes() == bits
    assert files_of(prefix) == before
    found, expected = (manifest.as_json() for manifest in (Manifest.read(prefix), expected))
    for count in expected["languages"].values():
        count["bytes"] = 0
    source = {"path": f"{prefix}.bin", "bytes": expected["files"]["bin"]["bytes"], "sha1": None, "version": None}
    expected["sources"] = [source | {"documents": len(rows)}]
    assert found == expected


@pytest.mark.parametrize("named", ["el", "ell_Grek", "expanded", "en", "original"])
def test_one_language_for_all(named, hf_tokenizer, rows, write_lines, preprocess) -> None:
    groups = (
        () if named in ("expanded", "original") else ("--original-languages", "en,es", "--expanded-languages", "el")
    )
    flags = ("--language", named, *groups)
    lines = write_lines("a.jsonl", rows)
    prefix = f"{preprocess(hf_tokenizer, '--input', lines, *flags, '--append-eod')}_text_document"
    bits, expected = CorpusPaths.of(prefix).lang.read_bytes(), Manifest.read(prefix)
    tag(prefix, hf_tokenizer, *flags, "--overwrite")
    assert CorpusPaths.of(prefix).lang.read_bytes() == bits
    found = Manifest.read(prefix)
    assert list(found.languages) == list(expected.languages) and found.files == expected.files


@pytest.fixture
def megatrons(tmp_path: Path, hf_tokenizer: Path, rows: list[dict[str, str]]) -> Path:
    """A corpus by Megatron's builder, each document a sequence per sentence as with --split-sentences."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for row in rows:
        sentences = [tokenizer.encode_whole(sentence) for sentence in row["text"].split(",") if sentence]
        if sentences:
            sentences[-1].append(tokenizer.eod_id)
        builder.add_document(sum(sentences, []), [len(sentence) for sentence in sentences])
    builder.finalize(str(tmp_path / "m.idx"))
    return tmp_path / "m"


def test_a_corpus_of_megatron_is_read_by_all_tools_and_the_trainer(
    megatrons, hf_tokenizer, rows, tmp_path, write_lines, preprocess, capsys
) -> None:
    languages = write_languages(tmp_path / "languages", [row["lang"] for row in rows])
    before = files_of(megatrons)
    flags = ("--document-languages", languages, "--original-languages", "en,es,zh")
    tag(megatrons, hf_tokenizer, *flags, "--output-prefix", tmp_path / "out" / "t")
    tagged = tmp_path / "out" / "t"
    assert files_of(megatrons) == before
    assert sorted(path.name for path in tagged.parent.iterdir()) == ["t.bin", "t.idx", "t.lang", "t.manifest.json"]
    assert all(path.is_symlink() for path in CorpusPaths.of(tagged)[:2])
    assert "warning" not in capsys.readouterr().err

    corpus, indexed = Corpus(tagged), IndexedDataset(str(megatrons))
    corpus.verify()
    assert len(corpus.sequence_lengths) > corpus.num_documents
    for index, row in enumerate(rows):
        ids, bits = corpus.document(index)
        sequences = range(*indexed.document_indices[index : index + 2])
        assert ids.tolist() == [id for sequence in sequences for id in indexed[sequence].tolist()]
        assert set(bits.tolist()) <= {int(row["lang"] in ("en", "es", "zh"))}

    inspect_data.main([str(tagged), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["documents"] == len(rows) and "counts per language" in summary["verified"]
    ours = preprocess(hf_tokenizer, "--input", write_lines("a.jsonl", rows), *KEY, "--append-eod")
    inputs = [str(tagged), f"{ours}_text_document"]
    merge_data.main(["--output-prefix", str(tmp_path / "all"), "--input", *inputs])
    assert Corpus(tmp_path / "all").verify().documents == 2 * len(rows)
    for bit in ("original", "expanded"):
        one = tmp_path / bit
        tag(megatrons, hf_tokenizer, "--language", bit, "--output-prefix", one)
        sample_data.main(["--input", str(one), "--output-prefix", f"{one}.sample", f"--{bit}-documents", "3"])
        assert Corpus(f"{one}.sample").verify().documents == 3
    read = {name: training_set(30, gpt_config([name])) for name in (str(tagged), str(tmp_path / "original"))}
    for sample, all_original in zip(*read.values(), strict=True):
        assert sample["tokens"].tolist() == all_original["tokens"].tolist()
        assert all_original["is_original"].all()
    assert 0 < np.mean([sample["is_original"].float().mean() for sample in read[str(tagged)]]) < 1


def test_stock_megatron_reads_our_corpora(hf_tokenizer, rows, write_lines, preprocess) -> None:
    """Megatron's dataset makes the samples of our files that it makes of its own; it ignores the others."""
    ours = f"{preprocess(hf_tokenizer, '--input', write_lines('a.jsonl', rows), *KEY, '--append-eod')}_text_document"
    theirs, indexed = f"{ours}.theirs", IndexedDataset(ours)
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=np.uint16)
    for first, stop in zip(indexed.document_indices[:-1], indexed.document_indices[1:], strict=True):
        sequences = [indexed[int(sequence)] for sequence in range(first, stop)]
        builder.add_document(np.concatenate([np.zeros(0, np.uint16), *sequences]), [len(ids) for ids in sequences])
    builder.finalize(f"{theirs}.idx")
    one, other = (training_set(30, gpt_config([prefix]), GPTDataset) for prefix in (ours, theirs))
    for index in range(30):
        np.testing.assert_array_equal(one[index]["tokens"], other[index]["tokens"])


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=30).filter(
        lambda all: any(map(any, all))
    ),
    originals=st.lists(st.booleans(), min_size=30, max_size=30),
    at_once=st.integers(1, 8),
)
def test_any_documents_get_their_bits(documents, originals, at_once, hf_tokenizer, tmp_path_factory) -> None:
    """Documents are lists of sequence lengths, some of them empty; files are read in pieces of any size, to find
    first and last tokens too."""
    folder = tmp_path_factory.mktemp("tag")
    builder = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.uint16)
    random, texts = np.random.default_rng(len(documents)), []
    for lengths in documents:
        texts.append(random.integers(0, 400, sum(lengths)).tolist())
        builder.add_document(texts[-1], lengths)
    builder.finalize(str(folder / "a.idx"))
    languages = write_languages(folder / "languages", ["en" if originals[i] else "el" for i in range(len(documents))])
    flags = ("--document-languages", languages, "--original-languages", "en", "--expanded-languages", "el")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.tagging.tokens._DOCUMENTS_AT_ONCE", at_once)
        patch.setattr("data_tools.tagging.tokens.BLOCK_BYTES", 2 * at_once)
        patch.setattr("moelpr.data.corpus_index._AT_ONCE", at_once)
        tag(folder / "a", hf_tokenizer, *flags, "--no-append-eod", "--tokenizer-hf-no-include-special-tokens")
        tokenizer = SimpleNamespace(record=SimpleNamespace(vocab_size=400, model="hf"))
        found = read_tokens(str(folder / "a"), CorpusIndex.open(folder / "a"), tokenizer)
    for position, counts in ((0, found.firsts), (-1, found.lasts)):
        assert counts.tolist() == np.bincount([ids[position] for ids in texts if ids], minlength=400).tolist()
    corpus = Corpus(folder / "a")
    bits = corpus.bits.slice(0, len(corpus.bits))
    of_all = zip(documents, originals, strict=False)
    assert bits.tolist() == [int(is_original) for lengths, is_original in of_all for _ in range(sum(lengths))]


def refused(message: str, prefix: Path, *arguments: Any) -> None:
    folder = prefix.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        tag(prefix, *arguments)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_wrong_languages_are_refused(megatrons, hf_tokenizer, rows, tmp_path) -> None:
    languages = [row["lang"] for row in rows]

    def expect(message: str, lines: list[str] | bytes, *flags: str) -> None:
        file = tmp_path / "languages"
        file.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
        flags = flags or ("--original-languages", "en,es,zh")
        refused(message, megatrons, hf_tokenizer, "--document-languages", file, *flags)

    expect("languages contains 39 languages, but .* 40 documents", languages[:-1])
    expect("languages contains 0 languages, but .* 40 documents", b"")
    expect("more languages than the 40 documents", [*languages, "el"])
    expect(
        'line 4: the language "el" is neither in',
        languages,
        "--original-languages",
        "en,es,zh",
        "--expanded-languages",
        "hu",
    )
    expect("no document has the language de", languages, "--original-languages", "de,en")
    expect("line 2: .* is not a language", [languages[0], "", *languages[2:]])
    expect("line 1: .* is not a language", b"\xff\xfe" + "\n".join(languages).encode("utf-16-le"))
    expect("line 1: .* is not a language", b"e" * 10_000)
    expect("--document-languages requires --original-languages", languages, "--expanded-languages", "el")
    one = (megatrons, hf_tokenizer, "--language")
    refused("--language el requires --original-languages", *one, "el")
    refused("--language el is neither in", *one, "el", "--expanded-languages", "hu")
    refused("a code such as eu", *one, "Greek?", "--original-languages", "en")
    refused("--language expanded excludes", *one, "expanded", "--original-languages", "en")


def write_ids(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_another_tokenizer_is_refused(hf_tokenizer, sp_tokenizer, tmp_path) -> None:
    eod = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer)).eod_id
    for name, documents, dtype, message, flags in (
        (
            "large",
            [[0, 5, 600, eod]],
            np.uint16,
            r"large.bin contains the token ID 600, .* IDs 0 to \d+; pass the tok",
            (),
        ),
        ("wide", [[0, 5, eod]], np.int32, "wide.idx describes int32 tokens, but Megatron writes uint16", ()),
        (
            "bare",
            [[0, 5, eod], [5, eod]],
            np.uint16,
            r"1 of 2 documents .* begin with 0 \('<s>'\).*no-include-special",
            (),
        ),
        (
            "ends",
            [[0, 5, 2], [0, 2], [0, eod], []],
            np.uint16,
            r"2 of 3 .* token 1 \('</s>'\); 2 end with 2 .*--eod-token",
            (),
        ),
        ("none", [[], []], np.uint16, "none contains no tokens", ()),
        ("name", [[0, eod]], np.uint16, "--eod-token <eod> is not in", ("--eod-token", "<eod>")),
    ):
        prefix = write_ids(tmp_path / name, documents, dtype)
        refused(message, prefix, hf_tokenizer, "--language", "expanded", *flags)
    tag(tmp_path / "ends", hf_tokenizer, "--language", "expanded", "--no-append-eod")
    assert not Manifest.read(tmp_path / "ends").append_eod
    refused("there is no tokenizer folder", tmp_path / "name", tmp_path / "missing", "--language", "expanded")
    refused("missing.bin and .*missing.idx are missing", tmp_path / "missing", hf_tokenizer, "--language", "expanded")
    tag(tmp_path / "bare", hf_tokenizer, "--language", "expanded", "--tokenizer-hf-no-include-special-tokens")
    assert not Manifest.read(tmp_path / "bare").tokenizer.special_tokens


def test_text_that_the_tokenizer_writes_otherwise_is_reported(hf_tokenizer, tmp_path, capsys) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    random = np.random.default_rng(0)
    prefix = write_ids(
        tmp_path / "a", [[0, *random.integers(10, 300, 50).tolist(), tokenizer.eod_id] for _ in range(9)]
    )
    tag(prefix, hf_tokenizer, "--language", "expanded")
    assert "warning: only 0 of the first 9 texts" in capsys.readouterr().err


def test_existing_bits_are_replaced_only_on_request(megatrons, hf_tokenizer, tmp_path) -> None:
    tag(megatrons, hf_tokenizer, "--language", "expanded")
    refused("has language bits already; pass --overwrite", megatrons, hf_tokenizer, "--language", "original")
    tag(megatrons, hf_tokenizer, "--language", "original", "--overwrite")
    corpus = Corpus(megatrons)
    corpus.verify()
    assert corpus.bits.num_original == len(corpus.tokens)
    out = ("--language", "original", "--output-prefix")
    refused("is the corpus itself", megatrons, hf_tokenizer, *out, megatrons)
    tag(megatrons, hf_tokenizer, *out, tmp_path / "b")
    refused("b.bin.* already exists", megatrons, hf_tokenizer, *out, tmp_path / "b")
    before = files_of(megatrons)
    refused("is the corpus itself", tmp_path / "b", hf_tokenizer, *out, megatrons, "--overwrite")
    tag(megatrons, hf_tokenizer, *out, tmp_path / "b", "--overwrite")
    assert (
        files_of(megatrons)
        == before
        == {f"m{Path(name).suffix}": file for name, file in files_of(tmp_path / "b").items()}
    )


def test_errors_are_one_sentence_with_exit_code_2(megatrons, hf_tokenizer) -> None:
    words = [
        sys.executable,
        "-m",
        "moelpr",
        "data",
        "tag",
        f"{megatrons}.idx",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
    ]
    words += ["--tokenizer-model", str(hf_tokenizer), "--document-languages", str(megatrons.with_name("none"))]
    done = subprocess.run([*words, "--original-languages", "en"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "none" in done.stderr
