import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from moelpr.base.errors import UserError
from moelpr.measure.report import live
from moelpr.measure.report.runs import read_run
from tests.support.run_folders import make_run


def test_pipe_gets_one_line_per_record_until_the_run_is_finished(tmp_path, capsys) -> None:
    """Written in pieces, as on a slow disk."""
    folder = make_run(tmp_path / "run", "stage1", 5, languages={}, is_finished=False, train_iters=7)

    def write() -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            for step in (6, 7):
                text = json.dumps({"iteration": step, "stage": "stage1", "lm_loss": 1.5}) + "\n"
                for piece in (text[:9], text[9:]):
                    time.sleep(0.05)
                    file.write(piece)
                    file.flush()
            languages = {"el": {"group": "expanded", "bits_per_byte": 1.25}}
            file.write(json.dumps({"iteration": 7, "event": "validation", "languages": languages}) + "\n")
            file.write(json.dumps({"iteration": 7, "event": "warning", "message": "look"}) + "\n")
        (folder / "FINISHED").write_text("7\n")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write)
        live.show(folder, 0.02, once=False)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "step 5 of 7 (71%)" in first and "left" in first
    assert lines == [
        "stage1 step 6: loss 1.5",
        "stage1 step 7: loss 1.5",
        "training step 7, validation: el 1.2500 bits per byte",
        "training step 7, warning: look",
    ]


def test_terminal_gets_values_languages_and_warnings(tmp_path: Path) -> None:
    languages = {"en": "original", "el[/b]": "expanded"}
    folder = make_run(tmp_path / "run", "stage2", 60, languages=languages, is_finished=False, train_iters=100)
    run = read_run(folder)
    live.add(run, {"iteration": 61, "stage": "stage2", "lm_loss": 0.125})
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    console.print(live.drawing(run))
    shown = console.export_text()
    assert "step 61 of 100 (61%)" in shown
    assert "0.125" in shown and "LPR" in shown and "█" in shown
    assert "en (original)" in shown and "el[/b] (expanded)" in shown and "bits per byte" in shown
    assert "warning, step 60: expert 3" in shown
    live.add(run, {"iteration": 61, "event": "warning", "message": "\x1b[2J"})
    languages = run.metrics.validations[-1]["languages"]
    languages["\x1b]0;"] = languages["en"]
    live.add(run, {"iteration": 62, "stage": "\x1b[1m", "lm_loss": 0.125})
    console.print(live.drawing(run))
    shown = console.export_text()
    assert r"warning, step 61: \x1b[2J" in shown and r"\x1b]0;" in shown and r"\x1b[1m" in shown and "\x1b" not in shown


def test_record_written_while_the_run_is_read_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", "stage1", 5, languages={})

    def read_then_write(path: Path) -> object:
        run = read_run(path)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 6, "lm_loss": 1.0}\n')
        return run

    monkeypatch.setattr(live, "read_run", read_then_write)
    ((run, actual),) = live.follow(folder, interval_s=0)
    assert [record["iteration"] for record in actual] == [6]
    for record in [*actual, *actual]:
        live.add(run, record)
    assert [record["iteration"] for record in run.metrics.steps][-2:] == [5, 6]


def test_run_that_replaces_its_file_is_read_again_and_one_that_is_removed_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "stage1", 5, languages={}, is_finished=False)
    path = folder / "metrics.jsonl"
    following = live.follow(folder, interval_s=0)
    run, actual = next(following)
    assert actual == []
    other = path.with_name("other")
    other.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    other.replace(path)
    again, actual = next(following)
    assert again is not run and again.step == 3 and actual == []
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no longer there"):
        next(following)
