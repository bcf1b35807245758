import pytest

from moelpr.base.errors import UserError
from tests.support.commands import moelpr
from tests.support.run_folders import make_run


def test_report_is_written_into_the_last_run_or_into_output(tmp_path, monkeypatch, capsys) -> None:
    runs = [make_run(tmp_path / name, name, 5) for name in ("stage1", "stage2")]
    moelpr("report", *runs)
    moelpr("report", *runs, "--output", tmp_path / "new")
    assert capsys.readouterr().out.split() == [str(runs[1] / "report.html"), str(tmp_path / "new/report.html")]
    for folder in (runs[1], tmp_path / "new"):
        assert {path.name for path in folder.glob("report.*")} == {"report.html", "report.md", "report.json"}


@pytest.mark.parametrize(
    ("arguments", "named"), [(("nowhere",), "nowhere"), ((), "RUN"), ((".",), "moelpr report stage1 stage2`")]
)
def test_bad_argument_is_named_and_a_folder_of_runs_answered_with_a_command(
    tmp_path, monkeypatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stage1", "stage2"):
        make_run(tmp_path / name, name, 5)
    with pytest.raises(UserError, match=named) as error:
        moelpr("report", *arguments)
    assert "\n" not in str(error.value)
