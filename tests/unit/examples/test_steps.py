"""A step is repeated until its command succeeds, and skipped only while nothing has replaced its output."""

from pathlib import Path

import pytest

from examples.steps import Steps
from moelpr.process.errors import UserError

COUNT_AND_EXIT = "import sys; open(sys.argv[1], 'a').write('ran '); sys.exit(int(sys.argv[2]))"


def test_a_step_runs_until_it_has_succeeded_and_again_if_its_command_changes(tmp_path: Path) -> None:
    steps, runs = Steps(tmp_path), tmp_path / "runs"

    def step(code: int) -> None:
        steps.step("s", "-c", COUNT_AND_EXIT, runs, str(code))

    with pytest.raises(UserError, match="step s exited with code 3"):
        step(3)
    step(0)
    step(0)
    assert runs.read_text() == "ran ran "
    assert [*steps.wall_times_s()] == ["s"]
    with pytest.raises(UserError, match="step s exited with code 4"):
        step(4)  # it may have removed what the command before has written
    step(0)
    assert runs.read_text() == "ran ran ran ran "


def test_a_step_has_its_variables_and_a_log(tmp_path: Path) -> None:
    Steps(tmp_path).step("s", "-c", "import os; print(os.environ['WORD'])", WORD="here")
    assert (tmp_path / "logs" / "s.log").read_text().splitlines()[1:] == ["here"]  # after the command
