"""Where a run starts."""

from pathlib import Path

import pytest


def test_a_start_is_needed(tmp_path: Path, refused) -> None:
    (said,) = refused("stage1", None)
    assert said.startswith("no checkpoint to start from; name one with --pretrained-checkpoint")
    (said,) = refused("stage1", tmp_path)
    assert "holds no Megatron checkpoint (latest_checkpointed_iteration.txt is missing)" in said


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, upcycled: str, make_checkpoint, accepted) -> None:
    save = str(tmp_path / "run")
    assert accepted("stage1", upcycled, "--save", save)["model_source"] == upcycled
    make_checkpoint("run", stage="stage1")
    assert accepted("stage1", upcycled, "--save", save)["model_source"] == save


def test_a_damaged_spec_hides_no_other_mistake(upcycled: str, refused) -> None:
    (Path(upcycled) / "model_spec.json").write_text("{}")
    said = refused("stage1", upcycled, "--reset-attention-mask")
    assert len(said) == 2
    assert "model_spec.json" in said[0]


@pytest.mark.parametrize("content", ["- a\n", "a: [1,", ""])
def test_a_damaged_record_of_a_run_is_said(upcycled: str, refused, content: str) -> None:
    (Path(upcycled) / "recipe.yaml").write_text(content)
    (said,) = refused("stage1", upcycled)
    assert said.startswith(f"{upcycled}/recipe.yaml, the record of the run, is damaged")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"number_of_hats": 3}, "model_spec.json names number_of_hats, which this Megatron has no argument for"),
        (
            {"rotary_percent": "all"},
            "in the checkpoint's model_spec.json, --rotary-percent: invalid float value: 'all'",
        ),
    ],
)
def test_a_shape_this_megatron_does_not_know_is_said(make_checkpoint, refused, shape: dict, said: str) -> None:
    lines = refused("stage1", make_checkpoint("future", shape=shape), "--reset-attention-mask")
    assert len(lines) == 2
    assert lines[0].startswith(said)
