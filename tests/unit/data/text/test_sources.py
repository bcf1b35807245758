"""Files are found by name, folder and pattern, in one order everywhere."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moelpr.base.errors import UserError
from moelpr.data.text.sources import find_files, open_source


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_is_read_with_its_links_and_without_what_is_hidden_or_of_a_corpus(tmp_path: Path) -> None:
    """A job may write its corpus, and what is unfinished, into the folder that it reads."""
    folder = tmp_path / "data"
    touch(folder, "a.jsonl", ".el.unfinished/state.json", ".ipynb_checkpoints/a.jsonl", "el.manifest.json")
    touch(tmp_path, "elsewhere/b.jsonl")
    (folder / "part2").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert find_files([str(folder)]) == [f"{folder}/a.jsonl", f"{folder}/part2/b.jsonl"]


def test_of_two_names_of_a_folder_the_first_counts_on_every_disk(tmp_path, monkeypatch) -> None:
    touch(tmp_path, "data/v1/a.jsonl")
    (tmp_path / "data" / "latest").symlink_to("v1")
    walk = os.walk

    def in_another_order(*words: Any, **options: Any) -> Any:
        for path, folders, names in walk(*words, **options):
            folders.sort(reverse=True)
            yield path, folders, names

    actual = find_files([str(tmp_path / "data")])
    monkeypatch.setattr(os, "walk", in_another_order)
    assert find_files([str(tmp_path / "data")]) == actual == [f"{tmp_path}/data/latest/a.jsonl"]


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """It was reported as empty, and its text was lost."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file; .*--input -"):
        open_source(str(tmp_path / "pipe"))


def test_names_folders_and_patterns_expand_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "b/2.jsonl", "b/1.jsonl", "b/x/3.jsonl.bz2", "a[1].jsonl", "c.txt")
    expected = "c.txt b/1.jsonl b/2.jsonl b/x/3.jsonl.bz2 a[1].jsonl".split()
    assert find_files(["c.txt", "b", "a[1].jsonl"]) == expected
    assert find_files(["**/*.jsonl"]) == ["a[1].jsonl", "b/1.jsonl", "b/2.jsonl"]
    with pytest.raises(UserError, match=r"no file matches nothing-\*; check the pattern"):
        find_files(["nothing-*"])


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text was lost without a word. Root may read every folder, so reading fails by other means."""
    touch(tmp_path, "a/1.jsonl", "a/locked/2.jsonl", "b/3.jsonl", "b/.hidden/4.jsonl")
    (tmp_path / "c").symlink_to(tmp_path / "a" / "locked")

    def read_unless_locked(read: Callable[[str], Any], path: str) -> Any:
        if Path(path).resolve().name in ("locked", ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(read_unless_locked, getattr(os, name)))
    monkeypatch.chdir(tmp_path)
    for pattern in ("a", "a/", "**/*.jsonl", "a/*/*.jsonl", "*/*/*.jsonl", "a/**", "c/*.jsonl", "[c]/*.jsonl"):
        with pytest.raises(UserError, match=r"(locked|c) can't be read \(Permission denied\)"):
            find_files([pattern])
    assert find_files(["b"]) == find_files(["b/*.jsonl"]) == ["b/3.jsonl"]
    assert find_files(["[ab]/*.jsonl"]) == ["a/1.jsonl", "b/3.jsonl"]
    assert find_files(["*/1.jsonl"]) == ["a/1.jsonl"]
    assert find_files(["a/*/2.jsonl"]) == ["a/locked/2.jsonl"]  # no list is needed, and --input a/locked/2.jsonl works
    assert find_files(["[b]*/**"]) == find_files(["[b]/*"]) == ["b/3.jsonl"]  # other folders do not matter


def test_a_name_that_is_not_utf_8_is_refused_before_the_work(tmp_path: Path) -> None:
    """The manifest could not be written after it, and the old corpus was gone."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe5\xeb.jsonl")
    Path(path).touch()
    with pytest.raises(UserError, match=r"input .*\\xe5\\xeb\.jsonl is not UTF-8; rename the file"):
        open_source(path)


def test_of_a_language_of_fineweb_2_only_the_training_text_is_read(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its layout: data/LANGUAGE/train, data/LANGUAGE/test, and data/LANGUAGE_removed with what was filtered out."""
    monkeypatch.chdir(tmp_path)
    languages, splits = ("eus_Latn", "glg_Latn"), ("test", "train")
    files = [f"data/{language}/{split}/000_00000.parquet" for language in languages for split in splits]
    touch(tmp_path, *files, "data/eus_Latn_removed/train/000_00000.parquet", "data/glg_Latn_removed/test/1.parquet")
    assert find_files(["data/eus_Latn"]) == [files[1]]
    assert capsys.readouterr().err == (
        "note: not text to train on, so not read unless it is named: data/eus_Latn/test/\n"
    )
    assert find_files(["data"]) == [files[1], files[3]]
    left_out = "data/eus_Latn/test/, data/eus_Latn_removed/, data/glg_Latn/test/ and 1 more\n"
    assert capsys.readouterr().err.endswith(left_out)
    # A named field is read.
    assert find_files(["data/eus_Latn/test"]) == [files[0]]
    assert find_files(["data/eus_Latn_removed"]) == ["data/eus_Latn_removed/train/000_00000.parquet"]
    assert find_files(["data/eus_Latn/*/*.parquet"]) == files[:2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "read, others",
    [
        ("train-00000-of-00002.parquet train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
        ("train-00000-of-00001-b2f1c0.parquet", "validation-00000-of-00001-8c1f03.parquet"),
        ("Train.jsonl more.jsonl", "test.jsonl dev.jsonl valid_1.jsonl.gz"),
        ("el-train.jsonl el.jsonl hu-test.jsonl", "el-test.jsonl"),  # all that there is in Hungarian
        ("train/a.jsonl train/test.jsonl", "test/a.jsonl val/b.jsonl"),
        ("test/a.jsonl validation/a.jsonl", ""),  # there is nothing to mix them with
        ("latest.jsonl train.jsonl contest-1.jsonl test-flights.jsonl", ""),
    ],
)
def test_splits_are_told_apart_by_their_names(read: str, others: str, tmp_path: Path, capsys) -> None:
    touch(tmp_path, *read.split(), *others.split())
    assert find_files([str(tmp_path)]) == sorted(f"{tmp_path}/{name}" for name in read.split())
    assert bool(capsys.readouterr().err) == bool(others)
