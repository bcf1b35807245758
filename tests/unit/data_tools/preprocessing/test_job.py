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
from tests.support.packed_files import parquet_table
from tests.unit.data_tools.conftest import SENTENCES, Output
from tests.unit.data_tools.preprocessing.conftest import FLAGS as LINES
from tests.unit.data_tools.preprocessing.conftest import stop_after

FLAGS = (*LINES, *"--json-keys text title --validation-share 0.2 --on-error skip --max-bad-share 0.5".split())
CORPORA = ("text", "title", "validation_text", "validation_title")


@pytest.fixture
def input_files(write_lines: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A plain file, an archive and a table, with malformed and blank lines."""
    names = list(SENTENCES)
    texts = [f"{SENTENCES[names[i % 5]]} {i}" * (i % 3) for i in range(300)]
    rows = [{"text": text, "title": f"title {i}", "lang": names[i % 5]} for i, text in enumerate(texts)]
    plain = write_lines("a.jsonl", rows[:120])
    plain.write_bytes(plain.read_bytes() + b"broken\n\n")
    other = write_lines("b.jsonl", rows[120:220])
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\n" + other.read_bytes() + b"{\n"))
    (tmp_path / "c.parquet").write_bytes(parquet_table(rows[220:], 30))
    return [plain, tmp_path / "b.gz", tmp_path / "c.parquet"]


def everything(made: Output) -> dict[str, bytes]:
    """All files in the folder of a job's output."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in made.prefix.parent.iterdir()}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("samples", [[], ["--max-samples", "200"]])
def test_resumed_job_writes_the_same_bytes_wherever_it_was_interrupted(
    every, samples, input_files, preprocess, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 4000)
    words = ("--input", *input_files, *FLAGS, *samples)
    whole = everything(preprocess(*words, out="whole/a"))
    assert len(whole) == 4 * len(CORPORA) + 2 + 1  # with manifests, two held-out texts and the list of skipped lines
    assert whole["a_validation_title.jsonl"].count(b"\n") > 10
    interruptions, save, saved = 0, job.Job.save, []

    def save_once(one: job.Job) -> None:  # then batches are lost and done again
        if one.state.manifests or not saved:
            saved.append(save(one))

    while True:
        saved.clear()
        with monkeypatch.context() as patched:
            patched.setattr(job, "SAVE_EVERY_S", 0)
            stop_after(patched, every, KeyboardInterrupt)
            if every == 3:
                patched.setattr(job.Job, "save", save_once)
            try:
                # Nor does it matter in which pieces the rest is read, or whether the first job had the flag.
                patched.setattr(batches, "BATCH_BYTES", 4000 + 300 * interruptions)
                resume = ["--resume"] if interruptions else []
                made = preprocess(*words, *resume, out="parts/a")
            except KeyboardInterrupt:
                interruptions += 1
                assert [path.name for path in (tmp_path / "parts").iterdir()] == [".a.unfinished"]
                continue
        break
    assert interruptions > 3
    assert everything(made) == whole


def test_job_killed_while_renaming_its_files_is_completed(input_files, preprocess, tmp_path, monkeypatch) -> None:
    words = ("--input", *input_files, *FLAGS)
    whole = everything(preprocess(*words, out="whole/a"))
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
                preprocess(*words, "--resume", out=out)
            except KeyboardInterrupt:
                pass
            else:
                break
        for path in (tmp_path / f"parts{renames}").glob("*.idx"):  # where there is an index the corpus is whole
            assert Manifest.read(path.with_suffix("")) is not None
            assert path.with_suffix(".bin").exists() and path.with_suffix(".lang").exists()
        assert everything(preprocess(*words, "--resume", out=out)) == whole
    assert renames > 14


@pytest.mark.parametrize("left", ["*", ".lock"])  # in the folder that it was removing
def test_job_killed_after_renaming_its_files_is_complete(input_files, preprocess, tmp_path, monkeypatch, left) -> None:
    words = ("--input", *input_files, *FLAGS, "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "__exit__", lambda self, *_: self._lock.close())
        whole = everything(preprocess(*words))
    del whole[".a.unfinished"]
    for path in (tmp_path / "out" / ".a.unfinished").iterdir():
        if not path.match(left):
            path.unlink()
    assert everything(preprocess(*words)) == whole


def test_error_keeps_the_unfinished_folder_only_with_resume(input_files, preprocess, tmp_path, monkeypatch) -> None:
    stop_after(monkeypatch, 1, UserError)
    for flags, left in (([], []), (["--resume"], [".a.unfinished"])):
        with pytest.raises(UserError, match="stopped"):
            preprocess("--input", *input_files, *FLAGS, *flags)
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
def test_job_is_resumed_only_with_the_same_settings(change, message, input_files, preprocess, monkeypatch) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0)
    words = ("--input", *input_files, *FLAGS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, 1, KeyboardInterrupt)
        preprocess(*words, "--resume")
    if not change:
        with open(input_files[0], "a") as file:
            file.write("\n")
    with pytest.raises(UserError, match=message):
        preprocess(*words, *change, "--resume")
    # Without the flag it starts from scratch, and with --overwrite, as moelpr run has it.
    made = preprocess(*words, *change, *(["--resume", "--overwrite"] if change else []))
    whole = preprocess(*words, *change, out="whole/a")
    assert all(made.content(name) == whole.content(name) for name in CORPORA)


def test_a_folder_that_another_job_writes_or_that_is_damaged_is_named(input_files, preprocess, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".a.unfinished"
    folder.mkdir(parents=True)
    with locked(folder / LOCK_FILE, "a"), pytest.raises(UserError, match="another process is writing .*out/a"):
        preprocess("--input", *input_files, *FLAGS)
    (folder / JOURNAL_FILE).write_text("{\n")
    with pytest.raises(UserError, match=rf"{JOURNAL_FILE}: not JSON .*remove the folder {folder}"):
        preprocess("--input", *input_files, *FLAGS, "--resume")


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
