"""The writer writes the bytes of Megatron's builder for any documents, also after an interruption."""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from benchmarks.common import write_corpus
from data_tools.corpus import corpus_writer
from data_tools.corpus.corpus import Corpus
from data_tools.corpus.corpus_writer import CorpusWriter, check_output
from data_tools.corpus.tokenized import Documents, token_dtype
from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE, locked, temporary_name
from tests.unit.data_tools.conftest import corpus_bytes

# A document is a list of runs (language bit, tokens); some are empty, some runs are.
DOCUMENTS = st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=4), max_size=30)


def as_documents(batch: list[list[tuple[bool, int]]], dtype: np.dtype) -> Documents:
    runs = [run for document in batch for run in document]
    lengths = np.array([sum(count for _, count in document) for document in batch], np.int64)
    tokens = (np.arange(lengths.sum()) % 251).astype(dtype)
    counts = np.array([count for _, count in runs], np.int64)
    return Documents(tokens, lengths, counts << 1 | np.array([bit for bit, _ in runs], np.uint8))


@settings(deadline=None, max_examples=40)
@given(batches=st.lists(DOCUMENTS, min_size=1, max_size=4), vocab_size=st.sampled_from([300, 100_000]))
def test_any_documents_become_megatrons_bytes_and_their_bits(batches, vocab_size, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("writer")
    dtype = token_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    runs = [as_documents(batch, dtype).runs for batch in batches]
    expected_bits = [np.repeat(actual & 1, actual >> 1) for actual in runs]
    with CorpusWriter(folder / "ours", vocab_size) as writer:
        for batch in batches:
            documents = as_documents(batch, dtype)
            writer.add(documents)
            stops = np.cumsum(documents.lengths)
            for length, stop in zip(documents.lengths.tolist(), stops.tolist(), strict=True):
                builder.add_document(documents.tokens[stop - length : stop], [length] if length else [])
        finish(writer)
    builder.finalize(str(folder / "theirs.idx"))
    for name in ("bin", "idx"):
        assert (folder / f"ours.{name}").read_bytes() == (folder / f"theirs.{name}").read_bytes()
    bits = Corpus(folder / "ours").bits
    bits.verify()
    np.testing.assert_array_equal(bits.slice(0, bits.num_tokens), np.concatenate(expected_bits))
    assert f" ({bits.num_original / max(bits.num_tokens, 1):.1%} original-language)" in str(writer)
    assert names_in(folder) == ["ours.bin", "ours.idx", "ours.lang", "theirs.bin", "theirs.idx"]


def write(prefix: Path) -> CorpusWriter:
    writer = CorpusWriter(prefix, 300)
    writer.add_document(np.arange(9), True)
    return writer


def finish(writer: CorpusWriter) -> None:
    writer.finalize()
    writer.commit()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    if not (child := os.fork()):
        write(tmp_path / "a").flush()
        os._exit(9)
    os.waitpid(child, 0)
    assert names_in(tmp_path) != []
    with write(tmp_path / "a") as writer:
        finish(writer)
    assert names_in(tmp_path) == ["a.bin", "a.idx", "a.lang"]
    assert Corpus(tmp_path / "a").num_documents == 1


def test_what_a_writer_left_that_was_killed_after_its_last_rename_is_removed(tmp_path: Path) -> None:
    with write(tmp_path / "a") as writer:
        finish(writer)
    (left := tmp_path / ".a.partial").mkdir()
    (left / "a.lengths").touch()
    with locked(left / LOCK_FILE, "a"), pytest.raises(UserError, match="exists"):  # not that of another writer
        check_output(str(tmp_path / "a"), overwrite=False)
    assert left.is_dir()
    with pytest.raises(UserError, match="exists"):
        check_output(str(tmp_path / "a"), overwrite=False)
    assert not left.exists()


def test_two_writers_of_one_corpus_exclude_each_other(tmp_path: Path) -> None:
    with write(tmp_path / "a") as writer:
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}/a;"):
            write(tmp_path / "a")
        finish(writer)
    assert Corpus(tmp_path / "a").num_documents == 1


def test_a_corpus_that_another_writer_has_just_finished_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    with write(tmp_path / "a") as first:
        first.finalize()

        @contextmanager
        def locked_after_first(folder: Path, _: object):  # noqa: ANN202
            folder.mkdir(exist_ok=True)
            first.commit()
            yield

        monkeypatch.setattr(corpus_writer, "locked_folder", locked_after_first)
        with pytest.raises(UserError, match="already exists"):
            write(tmp_path / "a")
        assert names_in(tmp_path) == ["a.bin", "a.idx", "a.lang"]
    assert Corpus(tmp_path / "a").num_documents == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "--output-prefix must end in a file name, such as data/el, got ''"),
        ("data/", "--output-prefix must end in a file name"),
        ("data/..", "--output-prefix must end in a file name"),
        ("é" * 120, "--output-prefix .* [0-9]+ bytes too long"),
        ("a" * 300, "--output-prefix .* bytes too long"),
        ("a" * 300 + "/b", r"can't write to the folder a+ \(File name too long\)"),
        ("a.txt/b", r"can't write to the folder a\.txt \("),
    ],
)
def test_output_names_that_are_impossible_are_reported(name, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    with pytest.raises(UserError, match=message):
        CorpusWriter(name, 300)
    assert names_in(tmp_path) == ["a.txt"]


def test_the_longest_name_is_accepted(tmp_path: Path) -> None:
    name = "a" * (255 - len(temporary_name(Path(".manifest.json")).name))
    with write(tmp_path / name) as writer:
        finish(writer)
    assert Corpus(tmp_path / name).num_documents == 1


def test_writer_resumes_where_it_was_flushed(tmp_path: Path) -> None:
    batch = as_documents([[(True, 5), (False, 4)], [], [(False, 3)]], token_dtype(300))
    with CorpusWriter(tmp_path / "whole", 300) as writer:
        writer.add(batch)
        writer.add(batch)
        finish(writer)
    work = tmp_path / "work"
    with CorpusWriter(tmp_path / "a", 300, folder=work) as writer:
        writer.add(batch)
        position = writer.flush()
        writer.add(as_documents([[(True, 50)]], writer.dtype))  # lost with the process
    with CorpusWriter(tmp_path / "a", 300, folder=work, position=position) as writer:
        writer.add(batch)
        finish(writer)
    assert corpus_bytes(tmp_path / "a") == corpus_bytes(tmp_path / "whole")
    with pytest.raises(UserError, match=r"b\.bin is truncated"):
        CorpusWriter(tmp_path / "b", 300, folder=work, position=position)


def test_id_too_large_for_the_dtype_is_rejected(tmp_path: Path) -> None:
    """Hugging Face vocabularies can have holes: a length below 65,500 with ids above 65,535."""
    message = "token ID 70,000 .*vocabulary of 400"
    with CorpusWriter(tmp_path / "a", 400) as writer, pytest.raises(UserError, match=message):
        writer.add_document(np.array([1, 70_000], np.int32), is_original=True)


def test_of_a_folder_beside_the_corpus_only_saved_orders_are_removed(tmp_path: Path) -> None:
    """Megatron saves them in PREFIX/cache; the folder may be the user's."""
    prefix = tmp_path / "data"
    for name in ("TaggedGPTDataset_indices/a.npy", "GPTDataset_indices/b.npy", "mine.txt"):
        (prefix / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / "cache" / name).touch()
    write_corpus(prefix, 300, [([1, 2], True)])
    assert [path.name for path in (prefix / "cache").iterdir()] == ["mine.txt"]
