"""The command line of reports."""

import sys
from pathlib import Path

import pytest

from moelpr.errors import UserError
from moelpr.report.__main__ import main
from tests.run_folders import make_run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["moelpr.report", *map(str, arguments)])
    main()


def test_report_is_written_into_the_last_run_or_into_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, name, 5) for name in ("stage1", "stage2")]
    facts = tmp_path / "facts.yaml"
    facts.write_text("Demo: {experts: 4}")
    call(monkeypatch, *runs)
    call(monkeypatch, "runs", *runs, "--facts", facts, "--output", tmp_path / "new")
    assert capsys.readouterr().out.split() == [str(runs[1] / "report.html"), str(tmp_path / "new/report.html")]
    for folder in (runs[1], tmp_path / "new"):
        assert {path.name for path in folder.glob("report.*")} == {"report.html", "report.md", "report.json"}
    assert "experts" in (tmp_path / "new/report.md").read_text()


def test_live_shows_the_current_state_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "live", make_run(tmp_path / "run", "stage1", 5), "--once")
    assert "5 of 5 (100%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"), [(("live", ".", "--interval", "0"), "--interval"), (("nowhere",), "nowhere")]
)
def test_bad_argument_is_named(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        call(monkeypatch, *arguments)


@pytest.mark.parametrize("arguments", [("live",), (), ("run", "--evaluation")])
def test_missing_argument_exits_with_code_2(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *arguments)
    assert exit_.value.code == 2
