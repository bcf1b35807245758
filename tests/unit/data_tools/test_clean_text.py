"""Cleaning removes what it says and nothing else, whatever the number of workers, and after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_tools import clean_text, merge_data
from data_tools.cleaning import references
from data_tools.cleaning.blocks import CorpusWriter, TextReader
from data_tools.cleaning.tally import CleaningReport
from moelpr.evaluate import harness
from moelpr.process.errors import UserError
from moelpr.text.sources import open_source
from moelpr.text.streams import open_stream
from tests.support.fasttext_model import write_fasttext_model

ROOT = Path(__file__).parents[3]
WORDS = {"el": ["ουρανός", "θάλασσα", "βουνό", "δρόμος"], "hu": ["ég", "tenger", "hegy", "út"], "en": ["sky", "sea"]}
LABELS = {"el": "ell_Grek", "hu": "hun_Latn", "en": "eng_Latn"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {word: LABELS[language] for language, words in WORDS.items() for word in words}
    return write_fasttext_model(tmp_path_factory.mktemp("model") / "lid.bin", words)


def text(language: str, seed: int, length: int = 40) -> str:
    """Words of a language, each followed by one that the model does not know and only this text has."""
    draw = random.Random(seed)
    own = "".join(chr(97 + int(digit)) for digit in str(seed))  # digits would all count as the same
    return " ".join(f"{draw.choice(WORDS[language])} {draw.choice('abcdefghij')}x{own}" for _ in range(length // 2))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.glob("*.jsonl.zst")):
        with open_stream(open_source(str(file))) as (stream, _):
            found += [json.loads(line) for line in stream]
    return found


def run(source: Path, output: Path, *words: str | Path) -> CleaningReport:
    clean_text.main(["--input", str(source), "--output", str(output), "--workers", "1", *map(str, words)])
    return CleaningReport.read(output / "_removed")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_step_removes_its_documents_and_the_rest_stays(
    tmp_path: Path, write_lines: Callable[..., Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = text("el", 99)
    part = " ".join(held_out.split()[7:19])
    documents = {
        "greek": text("el", 1),
        "hungarian": text("hu", 2),
        "english": text("en", 3),
        "mixed": f"{text('el', 4, 20)} {text('en', 4, 20)}",  # half of the words each: its probability is below 0.5
        "copy": text("el", 1).replace(" ", " , ").capitalize() + "!",
        "leaked": f"{text('el', 5)} {part.title()}. {text('el', 6)}",
        "eleven words": f"{text('el', 7)} {part.rpartition(' ')[0]} end {text('el', 8)}",
    }
    source = write_lines("a.jsonl", [{"id": name, "text": content, "n": 1} for name, content in documents.items()])
    reference = write_lines("test.jsonl", [{"text": held_out}, {"text": "three short words"}])
    found = run(
        source, tmp_path / "out", "--language-id", model, "--languages", "el,hun_Latn", "--decontaminate", reference
    )
    kept = {line["id"]: line for line in lines_of(tmp_path / "out")}
    assert sorted(kept) == ["eleven words", "greek", "hungarian"]
    assert kept["hungarian"] == {"id": "hungarian", "text": documents["hungarian"], "n": 1, "language": "hu"}
    removed = {
        folder.name: [line["id"] for line in lines_of(folder)] for folder in (tmp_path / "out/_removed").iterdir()
    }
    removed.pop("report.json")
    assert removed == {"language": ["english", "mixed"], "contaminated": ["leaked"], "near_duplicates": ["copy"]}
    assert {step: tally.of("all").documents for step, tally in found.removed.items()} == {
        step: len(names) for step, names in removed.items()
    }
    assert {language: amount.documents for language, amount in found.kept.languages.items()} == {"el": 2, "hu": 1}
    assert [example.why for example in found.removed["language"].examples] == ["other language", "uncertain"]
    assert found.removed["near_duplicates"].examples[0].source == f"{source}:5"
    printed = capsys.readouterr().out
    assert "1 of them shorter than 12 words" in printed and "is in test.jsonl" in printed


def test_a_document_in_another_language_than_it_states_is_removed(
    tmp_path: Path, write_lines: Callable[..., Path], model: Path
) -> None:
    languages = ["ell_Grek", "hu", "en", "el"]
    source = write_lines("a.jsonl", [{"text": text("el", n), "lang": code} for n, code in enumerate(languages)])
    run(source, tmp_path / "out", "--language-id", model, "--language-key", "lang", "--no-near-duplicates")
    assert [line["lang"] for line in lines_of(tmp_path / "out")] == ["ell_Grek", "el"]


@pytest.mark.parametrize("tasks", ["1", "5"])
def test_of_copies_one_stays_and_what_differs_stays(
    tmp_path: Path, write_lines: Callable[..., Path], tasks: str
) -> None:
    numbers = random.Random(tasks).choices(range(60), k=150)
    source = write_lines("a.jsonl", [{"text": text("en", number), "number": number} for number in numbers])
    run(source, tmp_path / "out", "--tasks", tasks)
    assert sorted(line["number"] for line in lines_of(tmp_path / "out")) == sorted(set(numbers))


def test_characters_of_scripts_without_spaces_count_as_words(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    reference = write_lines("test.jsonl", [{"text": "今天天气很好我们一起去海边散步吧"}])
    leaked, other = "他说:今天天气很好,我们一起去海边。", "今天天气很好，昨天下了一场大雨。"
    source = write_lines("a.jsonl", [{"text": leaked}, {"text": other}])
    run(source, tmp_path / "out", "--decontaminate", reference)
    assert [line["text"] for line in lines_of(tmp_path / "out")] == [other]


def test_workers_and_kills_do_not_change_a_byte(tmp_path: Path, write_lines: Callable[..., Path], model: Path) -> None:
    draw = random.Random(0)
    documents = [{"text": text(draw.choice(["el", "hu", "en"]), draw.randrange(150))} for _ in range(300)]
    source = write_lines("a.jsonl", documents)
    words = ["--language-id", str(model), "--languages", "el,hu", "--tasks", "6", "--input", str(source)]
    clean_text.main([*words, "--output", str(tmp_path / "one" / "out"), "--workers", "1"])
    whole = files_of(tmp_path / "one" / "out")
    output = tmp_path / "two" / "out"
    command = [sys.executable, "-m", "moelpr", "data", "clean", *words, "--output", str(output), "--workers", "2"]
    logs = output.parent / ".out.partial" / "logs"
    for complete in ("filter/completions/00001", "compare/completions/00003"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (logs / complete).exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    before = (logs / "filter" / "stats" / "00000.json").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == whole and before and not logs.parent.exists()


def test_parquet_has_the_same_documents_and_keeps_their_columns(
    tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    source = write_lines("a.jsonl", [{"text": text("en", n), "url": f"u{n}", "language": "eng"} for n in (1, 2, 1)])
    run(source, tmp_path / "out", "--format", "parquet")
    rows = parquet.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [row["text"] for row in rows] == [text("en", 1), text("en", 2)]
    assert [(row["language"], json.loads(row["metadata"])) for row in rows] == [
        ("en", {"url": f"u{n}"}) for n in (1, 2)
    ]


def test_benchmarks_are_their_questions_with_the_right_answers(
    tmp_path: Path, write_lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins of the harness's tasks: one with choices, one that generates, in a group."""

    def task(choices: list[str] | None, answer: Any) -> SimpleNamespace:
        return SimpleNamespace(
            eval_docs=[{"n": 1}],
            config=SimpleNamespace(doc_to_choice=choices),
            doc_to_text=lambda document: f"question {text('en', 7, 12)}",
            doc_to_choice=lambda document: choices,
            doc_to_target=lambda document: answer,
        )

    found = {"group": [{"a": task(["no", "surely"], 1), "b": task(None, "of course")}]}
    monkeypatch.setattr(harness, "load_tasks", lambda names, path: (None, found))
    monkeypatch.setattr(references, "find_spec", lambda name: True)
    assert [x.split()[-1] for x in references.texts_of("group", "text")] == ["surely", "course"]
    source = write_lines("a.jsonl", [{"text": f"{text('en', 7, 12)} surely"}, {"text": f"{text('en', 7, 12)} no"}])
    run(source, tmp_path / "out", "--decontaminate", "group", "--ngram-words", "13", "--no-near-duplicates")
    assert [line["text"].split()[-1] for line in lines_of(tmp_path / "out")] == ["no"]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("tasks", [1, 3, 7])
def test_the_tasks_of_a_reader_share_the_documents(tmp_path: Path, form: str, tasks: int) -> None:
    documents = [{"text": f"text {number}", "number": number} for number in range(40)]
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    for part in range(2):
        path = tmp_path / f"{part}.{form}"
        if form == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(documents), path, row_group_size=5)
        else:
            path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True) if form == "jsonl.zst" else lines)
    found = [document for rank in range(tasks) for document in TextReader([str(tmp_path)]).run(None, rank, tasks)]
    assert [document.text for document in found] == [document["text"] for document in documents] * 2
    assert all(document.metadata == {"number": int(document.text.split()[1])} for document in found)


def test_blocks_write_the_corpus_that_preprocessing_writes(
    tmp_path: Path,
    write_lines: Callable[..., Path],
    hf_tokenizer: Path,
    preprocess: Callable[..., Path],
    corpus_bytes: Callable[..., list[bytes]],
) -> None:
    from datatrove.executor import LocalPipelineExecutor

    source = write_lines("a.jsonl", [{"text": text(code, n), "language": code} for n in range(9) for code in WORDS])
    flags = ["--language-key", "language", "--original-languages", "en", "--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", str(hf_tokenizer)]
    steps = [TextReader([str(source)]), CorpusWriter(str(tmp_path / "parts/a"), flags)]
    LocalPipelineExecutor(steps, tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
    parts = [str(tmp_path / f"parts/a-{rank:05d}_text_document") for rank in range(2)]
    merge_data.main(["--input", *parts, "--output-prefix", str(tmp_path / "all")])
    whole = preprocess(hf_tokenizer, "--input", source, *flags[:4])
    assert corpus_bytes(tmp_path / "all") == corpus_bytes(f"{whole}_text_document")


def test_malformed_lines_stop_the_job_or_are_counted(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    source = write_lines("a.jsonl", [{"text": text("en", 1)}, {"txt": "x"}, {"text": ""}, {"text": text("en", 2)}])
    with pytest.raises(UserError, match=r'a\.jsonl:2: the key "text" is missing'):
        run(source, tmp_path / "out")
    found = run(source, tmp_path / "out", "--on-error", "skip")
    assert found.kept.of("all").documents == 2 and found.removed["malformed"].of("all").documents == 2


def test_jobs_that_still_run_are_not_submitted_again(tmp_path, write_lines, monkeypatch) -> None:
    """sbatch and squeue are stubs; tests/slurm has a real Slurm."""
    (tmp_path / "bin").mkdir()
    queue = '[[ -e done ]] || seq 10 | sed "s/$/ clean-x/"'
    for name, body in {"sbatch": "echo x >>calls; wc -l <calls", "squeue": queue}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    write_lines("a.jsonl", [{"text": text("en", 1)}])
    words = ["--input", "a.jsonl", "--output", "out", "--executor", "slurm", "--partition", "cpu"]
    clean_text.main(words)
    submitted = Path("calls").read_text().splitlines()
    assert len(submitted) == 10  # five arrays, and datatrove's jobs that add up what each of them logs
    for more in ([], ["--no-near-duplicates", "--language-id", "py3langid"]):  # other settings would start again
        with pytest.raises(UserError, match="jobs 1, 3, 5, 7, 9 of .* are pending or running on Slurm"):
            clean_text.main([*words, *more])
    assert Path("calls").read_text().splitlines() == submitted
    Path("done").touch()
    clean_text.main(words)
    assert len(Path("calls").read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--language-id nosuch.bin", "no model nosuch.bin"),
        ("--language-id a.jsonl", "no fastText model"),
        ("--language-id {model} --languages fr", "does not know fr"),
        ("--language-id py3langid --languages quc", "does not support language quc"),
        ("--language-id {model} --languages klingonese", "klingonese is no code"),
        ("--languages el", "--languages needs --language-id"),
        ("--language-id {model} --min-confidence 2", "between 0 and 1"),
        ("--json-key txt", 'the key "txt" is missing'),
        ("--language-key lang", 'the language key "lang"'),
        ("--decontaminate nosuch", "nosuch"),
        ("--decontaminate a.jsonl --ngram-words 0", "--ngram-words must be at least 1"),
        ("--no-near-duplicates", "nothing to do"),
        ("--executor slurm", "--partition"),
        ("--sbatch account=a", "--sbatch needs --executor slurm"),
        ("--executor ray", "needs Ray"),
        ("--tasks 0", "--tasks must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path,
    write_lines: Callable[..., Path],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines("a.jsonl", [{"text": text("en", 1)}])
    arguments = words.format(model=model).split()
    with pytest.raises(UserError, match=message):
        clean_text.main(["--input", "a.jsonl", "--output", "out", "--workers", "1", *arguments])
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob(".out.partial/*")] != [".lock"]  # what can't be resumed is gone
