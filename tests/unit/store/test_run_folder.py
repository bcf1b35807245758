"""Reading the files of a run folder, also if they are missing or damaged."""

from pathlib import Path

import pytest

from moelpr.store.run_folder import TRACKER_FILE, read_json, read_settings, saved_step


def test_settings_are_those_of_recipe_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1.0e-3\nstage: stage1\n")
    assert read_settings(tmp_path) == {"lr": 1e-3, "stage": "stage1"}


def test_settings_of_a_wrong_type_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stage: []\nsave: 3\nckpt_step: one\nmodel_source:\nlr: text\n")
    assert read_settings(tmp_path) == {"model_source": None, "lr": "text"}
    (tmp_path / "recipe.yaml").write_text(f'world_size: x\ntrain_iters: {10**18}\ndata_path: 5\nsave: "a\\0"\n')
    assert read_settings(tmp_path) == {}
    (tmp_path / "recipe.yaml").write_text('data_path: ["1", "a\\0b"]\n')
    assert read_settings(tmp_path) == {}


@pytest.mark.parametrize("content", [None, "- a list\n", "{", "\0"])
def test_a_missing_or_damaged_recipe_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    assert read_settings(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"torch": "2.15"}', {"torch": "2.15"}),
        (b"[]", None),
        (b"{", None),
        (b"\xff", None),
        (b'{"a": "\\ud800"}', None),
    ],
)
def test_a_json_file_is_an_object_or_none(tmp_path: Path, content: bytes, expected: dict | None) -> None:
    (tmp_path / "versions.json").write_bytes(content)
    assert read_json(tmp_path / "versions.json") == expected
    assert read_json(tmp_path / "missing.json") is None


@pytest.mark.parametrize(
    ("content", "expected"), [("12\n", 12), ("", None), ("release", None), ("-1", None), ("1" * 5000, None)]
)
def test_a_saved_step_is_a_number_that_can_be_one(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / TRACKER_FILE).write_text(content)
    assert saved_step(tmp_path) == expected
