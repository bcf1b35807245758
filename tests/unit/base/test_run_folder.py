"""Reading the files of a run folder, also if they are missing or damaged."""

from pathlib import Path

import pytest

from moelpr.base.run_folder import TRACKER_FILE, Command, read_command, read_settings, read_versions, saved_step


def test_settings_are_those_of_recipe_yaml_in_the_order_in_which_they_were_recorded(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1.0e-3\nstage: stage1\nadam_beta1: 0.9\nworld_size: 8\n")
    expected = {"lr": 1e-3, "stage": "stage1", "adam_beta1": 0.9, "world_size": 8}
    assert list((read_settings(tmp_path) or {}).items()) == list(expected.items())


@pytest.mark.parametrize(
    "content", [None, "- a list\n", "{", "\0", "stage: 3", f"train_iters: {10**18}", 'data_path: ["1", "a\\0b"]']
)
def test_a_missing_or_damaged_recipe_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    assert read_settings(tmp_path) is None


def test_what_is_not_recorded_is_empty(tmp_path: Path) -> None:
    assert read_versions(tmp_path) == {} and read_command(tmp_path) == Command([])
    Command(["--x", "ä"], 2).write(tmp_path)
    assert read_command(tmp_path) == Command(["--x", "ä"], 2)
    (tmp_path / "versions.json").write_text('{"torch": "2.15"}')
    assert read_versions(tmp_path) == {"torch": "2.15"}
    for content in (b"[]", b"{", b"\xff", b'{"a": "\\ud800"}'):
        (tmp_path / "versions.json").write_bytes(content)
        assert read_versions(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "expected"), [("12\n", 12), ("", None), ("release", None), ("-1", None), ("1" * 5000, None)]
)
def test_a_saved_step_is_a_number_that_can_be_one(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / TRACKER_FILE).write_text(content)
    assert saved_step(tmp_path) == expected
