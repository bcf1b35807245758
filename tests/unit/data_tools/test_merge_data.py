"""Merged corpora have the bytes of one corpus; corpora that can't be merged are reported and leave nothing."""

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import write_corpus
from data_tools import merge_data
from data_tools.corpus.corpus import Corpus, CorpusPaths
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.manifest import LanguageCount, Manifest, Source
from tests.unit.data_tools.conftest import corpus_bytes

Documents = list[tuple[list[int], bool]]


def merge(output: Path, *inputs: Path, flags: tuple[str, ...] = ()) -> None:
    call(merge_data.main, ["--input", *map(str, inputs), "--output-prefix", str(output), *flags])


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_merged_corpora_are_the_bytes_of_one(vocab_size: int, tmp_path: Path) -> None:
    """Bits that begin anywhere in a byte, empty documents, and a part without any token."""
    random = np.random.default_rng(0)
    parts: list[Documents] = [
        [(random.integers(0, 300, random.integers(0, 30)).tolist(), bool(random.integers(2))) for _ in range(count)]
        for count in (5, 1, 13, 2)
    ]
    parts.insert(2, [([], True)])
    parts.insert(4, [])
    inputs = [write_corpus(tmp_path / f"part{index}", vocab_size, part) for index, part in enumerate(parts)]
    whole = write_corpus(tmp_path / "whole", vocab_size, [document for part in parts for document in part])
    merge(tmp_path / "merged", *inputs)
    assert corpus_bytes(tmp_path / "merged") == corpus_bytes(whole)


def test_unmergeable_corpora_are_reported_and_leave_nothing(tmp_path: Path) -> None:
    parts = {"small": (300, [([1], True)]), "large": (100_000, [([1], True)]), "empty": (300, [])}
    parts["damaged"] = 300, [([1, 2], True)]
    corpora = {name: write_corpus(tmp_path / name, *part) for name, part in parts.items()}
    lang = CorpusPaths.of(corpora["damaged"]).lang
    lang.write_bytes(lang.read_bytes()[:-1] + b"\x01")
    for output, inputs, message in [
        ("out", "small large", "large.bin .*int32, .*small.bin .*uint16"),
        ("out", "small gone", "gone.bin and .*gone.idx"),
        ("out", "small damaged", "damaged.lang is damaged"),
        ("out", "empty", "empty contain no tokens"),
        ("small", "large", "small.bin.*--overwrite"),
    ]:
        with pytest.raises(UserError, match=message):
            merge(tmp_path / output, *(tmp_path / name for name in inputs.split()))
    assert not [*tmp_path.glob("out*"), *tmp_path.glob(".*")]


def test_the_merged_manifest_is_that_of_one_job_and_belongs_to_its_files(make_corpus: Callable) -> None:
    first = make_corpus("first", [("en", [1, 2]), ("el", [3])])
    second = make_corpus("second", [("el", [4, 5, 6]), ("hu", [])])
    third = Manifest.read(second)
    third.sources[0] = Source("first.jsonl", 10, None, 2)  # two shards of one file
    third.write(second)
    merge(first.parent / "both", first, second, flags=("--remove-input",))
    manifest = Corpus(first.parent / "both").verify()
    assert manifest is not None
    assert [*manifest.languages] == ["el", "en", "hu"]  # as a job sorts them
    greek, hungarian = LanguageCount("expanded", 2, 4, 16), LanguageCount("expanded", 1, 0, 0)
    assert manifest.languages == {"en": LanguageCount("original", 1, 2, 8), "el": greek, "hu": hungarian}
    assert manifest.sources == [Source("first.jsonl", 10, None, 4)]
    assert (manifest.documents, manifest.tokens, manifest.skipped_lines) == (4, 6, 2)
    left = {path.name for path in first.parent.iterdir()}
    assert left == {"both.bin", "both.idx", "both.lang", "both.manifest.json"}


def test_without_a_manifest_in_each_input_the_output_has_none(make_corpus, capsys) -> None:
    first, second = make_corpus("first", [("en", [1])]), make_corpus("second", [("el", [2])], manifest=False)
    merge(first.parent / "both", first, second)
    assert "second has no manifest, so" in capsys.readouterr().out
    assert Manifest.read(first.parent / "both") is None


def test_corpora_that_do_not_belong_together_are_rejected(make_corpus: Callable) -> None:
    one = make_corpus("one", [("en", [1])])

    def expect(message: str, prefix: Path, *others: Path, **changes: object) -> None:
        dataclasses.replace(Manifest.read(prefix), **changes).write(prefix)
        with pytest.raises(UserError, match=message):
            merge(one.parent / "out", one, *others, prefix)
        assert not list(one.parent.glob("*out*"))

    expect("one .* tokenizer hf, .*b .* hf;", make_corpus("b", [("el", [2])], fingerprint="x"))
    expect("one and .*c .*--append-eod", make_corpus("c", [("el", [2])]), append_eod=False)
    english, greek = {"en": LanguageCount("expanded", 1, 1, 1)}, {"el": LanguageCount("original", 1, 1, 1)}
    d, f, g = (make_corpus(name, [(language, [2])]) for name, language in (("d", "el"), ("f", "el"), ("g", "es")))
    expect("en is an original language in .*one, .* expanded one in .*d;", d, languages=english)
    expect("el is an expanded language in .*f, but an original one in .*g;", g, f, languages=greek)
    e = make_corpus("e", [("el", [2])])
    Path(f"{e}.bin").write_bytes(b"\x03\x00")
    expect("e.bin is damaged or", e)


def test_an_output_that_is_an_input_under_another_name_is_refused(tmp_path: Path) -> None:
    """--remove-input removed what had just been written."""
    one, two = (write_corpus(tmp_path / name, 300, [([1], True)]) for name in ("one", "two"))
    (tmp_path / "link").symlink_to(tmp_path)
    before = corpus_bytes(one)
    for name in (one, tmp_path / "link" / "one", tmp_path / "link" / ".." / tmp_path.name / "one"):
        with pytest.raises(UserError, match="is one of the inputs"):
            merge(name, one, two, flags=("--overwrite", "--remove-input"))
    assert corpus_bytes(one) == before
    merge(tmp_path / "twice", one, one)  # text may be repeated
    assert Corpus(str(tmp_path / "twice")).num_documents == 2


def test_more_corpora_than_open_files_are_usually_allowed_can_be_merged(make_corpus: Callable, tmp_path: Path) -> None:
    """Each takes three files; the usual limit is 1,024, and the hard one much higher."""
    corpora = [make_corpus(f"corpus{number}", [("en", [number])]) for number in range(12)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        merge(tmp_path / "all", *corpora)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
