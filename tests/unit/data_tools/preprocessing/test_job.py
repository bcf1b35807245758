"""An interrupted job leaves nothing that looks complete; resumed, it writes the bytes of an uninterrupted one."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.preprocessing import batches, job
from data_tools.preprocessing.job_spec import describe_job
from data_tools.preprocessing.settings import Settings
from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE, locked
from moelpr.base.journal import JOURNAL_FILE
from moelpr.base.settings import parse
from moelpr.data.manifest import Manifest
from tests.unit.data_tools.preprocessing.conftest import stop_after

FLAGS = (
    *("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod", "--json-keys", "text", "title"),
    *("--validation-share", "0.2", "--on-error", "skip", "--max-bad-share", "0.5"),
)
CORPORA = ("text", "title", "validation_text", "validation_title")


@pytest.fixture
def input_files(sentences: dict[str, str], write_lines: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A plain file, an archive and a table, with malformed and blank lines."""
    from pyarrow import Table, parquet

    names = list(sentences)
    rows = [
        {"text": f"{sentences[names[i % 5]]} {i}" * (i % 3), "title": f"title {i}", "lang": names[i % 5]}
        for i in range(300)
    ]
    plain = write_lines("a.jsonl", rows[:120])
    plain.write_bytes(plain.read_bytes() + b"broken\n\n")
    other = write_lines("b.jsonl", rows[120:220])
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\n" + other.read_bytes() + b"{\n"))
    parquet.write_table(Table.from_pylist(rows[220:]), tmp_path / "c.parquet", row_group_size=30)
    return [plain, tmp_path / "b.gz", tmp_path / "c.parquet"]


def everything(prefix: Path) -> dict[str, bytes]:
    """All files with the name of an output prefix, without what names the folder."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in prefix.parent.iterdir()}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("samples", [[], ["--max-samples", "200"]])
def test_resumed_job_writes_the_same_bytes_wherever_it_was_interrupted(
    every, samples, input_files, preprocess, hf_tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 4000)
    words = ("--input", *input_files, *FLAGS, *samples)
    whole = everything(preprocess(hf_tokenizer, *words, out="whole/a"))
    assert len(whole) == 4 * len(CORPORA) + 2 + 1  # with manifests, two held-out texts and the list of skipped lines
    assert whole["a_validation_title.jsonl"].count(b"\n") > 10
    interruptions = 0
    while True:
        with monkeypatch.context() as patched:
            patched.setattr(job, "SAVE_EVERY_S", 0 if every == 1 else 1e9)
            stop_after(patched, every, KeyboardInterrupt)
            if every == 3:  # saved once, then three batches that are lost and done again
                saved = iter([True, False, False, False])
                patched.setattr(job, "SAVE_EVERY_S", _Sometimes(saved))
            try:
                # Nor does it matter in which pieces the rest is read, or whether the first job had the flag.
                patched.setattr(batches, "BATCH_BYTES", 4000 + 300 * interruptions)
                resume = ["--resume"] if interruptions else []
                prefix = preprocess(hf_tokenizer, *words, *resume, out="parts/a")
            except KeyboardInterrupt:
                interruptions += 1
                assert [path.name for path in (tmp_path / "parts").iterdir()] == [".a.unfinished"]
                continue
        break
    assert interruptions > 3
    assert everything(prefix) == whole


class _Sometimes(float):
    """A number of seconds that has passed when the iterator says so."""

    answers: Any

    def __new__(cls, answers: Any) -> "_Sometimes":
        made = super().__new__(cls, 0)
        made.answers = answers
        return made

    def __le__(self, _: object) -> bool:  # elapsed >= seconds asks the right-hand side first: it is the subclass
        return next(self.answers, False)


def test_job_killed_while_renaming_its_files_is_completed(input_files, preprocess, hf_tokenizer, tmp_path, monkeypatch):
    words = ("--input", *input_files, *FLAGS)
    whole = everything(preprocess(hf_tokenizer, *words, out="whole/a"))
    replace = os.replace
    for renames in range(3, 21, 3):
        out = f"parts{renames}/a"
        left = renames

        def some(source: Any, target: Any) -> None:
            nonlocal left
            if "unfinished" in str(source) and "unfinished" not in str(target):
                left -= 1
                if left < 3:
                    raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", some)
            try:
                preprocess(hf_tokenizer, *words, "--resume", out=out)
            except KeyboardInterrupt:
                pass
            else:
                break
        for path in (tmp_path / f"parts{renames}").glob("*.idx"):  # where there is an index the corpus is whole
            assert Manifest.read(path.with_suffix("")) is not None
            assert path.with_suffix(".bin").exists() and path.with_suffix(".lang").exists()
        assert everything(preprocess(hf_tokenizer, *words, "--resume", out=out)) == whole
    assert renames > 14


@pytest.mark.parametrize("left", ["*", ".lock"])  # in the folder that it was removing
def test_job_killed_after_renaming_its_files_is_complete(
    input_files, preprocess, hf_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    words = ("--input", *input_files, *FLAGS, "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "__exit__", lambda self, *_: self._lock.close())
        whole = everything(preprocess(hf_tokenizer, *words))
    del whole[".a.unfinished"]
    for path in (tmp_path / "out" / ".a.unfinished").iterdir():
        if not path.match(left):
            path.unlink()
    assert everything(preprocess(hf_tokenizer, *words)) == whole


def test_error_keeps_the_unfinished_folder_only_with_resume(
    input_files, preprocess, hf_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1, UserError)
    for flags, left in (([], []), (["--resume"], [".a.unfinished"])):
        with pytest.raises(UserError, match="stopped"):
            preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, *flags)
        assert [path.name for path in (tmp_path / "out").iterdir()] == left


@pytest.mark.parametrize(
    "change, message",
    [
        (["--seed", "7"], "different --seed; .*--resume"),
        (["--expanded-languages", "el,hu"], "different --expanded-languages"),
        (["--eod-token", "<|endoftext|>"], "different tokenizer"),
        (["--tokenizer-hf-no-include-special-tokens"], "different tokenizer"),
        ([], "different input files"),
    ],
)
def test_job_is_resumed_only_with_the_same_settings(
    change, message, input_files, preprocess, hf_tokenizer, corpus_bytes, monkeypatch
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, 1, KeyboardInterrupt)
        preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, "--resume")
    if not change:
        with open(input_files[0], "a") as file:
            file.write("\n")
    with pytest.raises(UserError, match=message):
        preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, *change, "--resume")
    # Without the flag it starts from scratch, and with --overwrite, as moelpr run has it.
    flags = ["--resume", "--overwrite"] if change else []
    prefix = preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, *change, *flags)
    whole = preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, *change, out="whole/a")
    for name in CORPORA:
        assert corpus_bytes(f"{prefix}_{name}_document") == corpus_bytes(f"{whole}_{name}_document")


def test_two_jobs_cannot_write_one_corpus(input_files, preprocess, hf_tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".a.unfinished"
    folder.mkdir(parents=True)
    with locked(folder / LOCK_FILE, "a"), pytest.raises(UserError, match="out/a"):
        preprocess(hf_tokenizer, "--input", *input_files, *FLAGS)


def test_damaged_state_is_reported(input_files, preprocess, hf_tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".a.unfinished"
    folder.mkdir(parents=True)
    (folder / JOURNAL_FILE).write_text("{\n")
    with pytest.raises(UserError, match=rf"{JOURNAL_FILE}: not JSON .*remove the folder {folder}"):
        preprocess(hf_tokenizer, "--input", *input_files, *FLAGS, "--resume")


def test_every_flag_that_changes_the_bytes_must_be_the_same_to_resume(input_files, hf_tokenizer, tmp_path) -> None:
    """A flag that is new must be added to the settings, or here."""
    speed_or_output = {"workers", "log_interval", "overwrite", "resume", "max_bad_share", "tokenizer_backend"}
    by_content = {"input", "dataset_info", "dataset_dir", "tokenizer_type", "tokenizer_model", "eod_token"}
    by_content |= {"tokenizer_hf_no_include_special_tokens", "conversations", "chat_template_from", "max_tokens"}
    words = [*FLAGS, "--input", *input_files, "--tokenizer-type", "HuggingFaceTokenizer"]
    words += ["--tokenizer-model", hf_tokenizer, "--output-prefix", tmp_path / "a", "--filter", "not is_null(text)"]
    arguments = parse(Settings, [*map(str, words)])
    named = {name[2:].replace("-", "_") for name in describe_job(arguments).settings if name.startswith("--")}
    assert named == vars(arguments).keys() - speed_or_output - by_content
