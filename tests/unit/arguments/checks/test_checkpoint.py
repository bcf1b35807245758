"""The checkpoint a run starts from is of the right kind, and the flags agree with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec


def test_a_stage_needs_the_right_kind_of_checkpoint(upcycled: str, dense: str, refused) -> None:
    (said,) = refused("stage2", dense)
    assert said == (
        f"--stage stage2 needs an upcycled checkpoint, but {dense} is dense; upcycle it with "
        "checkpoint_convert/hf_to_mcore.py --num-new-experts N"
    )
    (said,) = refused("dense", upcycled)
    assert said.startswith(f"--stage dense was given the MoE checkpoint {upcycled}; use --stage stage1 or stage2")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--moe-router-topk", "1"], "--moe-router-topk 1"),
        (["--moe-router-topk=1"], "--moe-router-topk 1"),
        (["--num-experts", "8"], "--num-experts 8"),
        (["--num-original-experts", "2"], "--num-original-experts 2"),
        (["--hidden-size", "64"], "--hidden-size 64"),
        (["--norm-epsilon", "1e-5"], "--norm-epsilon 1e-05"),
        (["--untie-embeddings-and-output-weights"], "--untie-embeddings-and-output-weights True"),
        (["--moe-layer-freq", "[0,1,1]"], "--moe-layer-freq [0, 1, 1]"),
    ],
)
def test_a_flag_that_contradicts_the_model_is_refused(upcycled: str, refused, words: list[str], found: str) -> None:
    (said,) = refused("stage1", upcycled, *words)
    assert said.startswith(f"{found} contradicts the checkpoint {upcycled}, whose model_spec.json says ")
    assert said.endswith("; drop the flag, or convert the model again")


def test_a_flag_that_repeats_the_model_is_taken(upcycled: str, accepted) -> None:
    assert accepted("stage1", upcycled, "--num-experts", "4", "--moe-layer-freq", "[1,1,1]")["num_experts"] == 4


def test_the_number_of_original_experts_comes_from_the_checkpoint(
    make_checkpoint, moe_spec: ModelSpec, accepted, refused, capsys
) -> None:
    spec = replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=3))
    further = make_checkpoint("further", spec)
    assert accepted("stage1", further)["num_original_experts"] == 3
    assert f"{further} has 3 original experts, so it has learnt languages before" in capsys.readouterr().err
    accepted("stage1", make_checkpoint("first"))
    assert "original experts" not in capsys.readouterr().err
    assert accepted("stage1", further, "--num-original-experts", "3")["num_original_experts"] == 3
    (said,) = refused("stage1", further, "--num-original-experts", "1")
    assert said.startswith(
        f"--num-original-experts 1 contradicts the checkpoint {further}, whose model_spec.json says 3"
    )


@pytest.mark.parametrize("flag", ["--num-experts", "--num-original-experts"])
def test_a_dense_model_takes_no_number_of_experts(dense: str, refused, flag: str) -> None:
    (said,) = refused("dense", dense, flag, "4")
    assert said.startswith(f"{flag} has no meaning for the dense checkpoint {dense}")


def test_a_family_with_other_layers_is_refused(make_checkpoint, refused) -> None:
    said = refused("stage1", make_checkpoint("other", shape={"normalization": "LayerNorm", "swiglu": False}))
    assert [line.split("; ")[0].split("model with ")[1] for line in said] == ["normalization LayerNorm", "swiglu False"]


def test_weights_that_are_gone_are_missed_before_anything_is_built(upcycled: str, refused) -> None:
    tracker = Path(upcycled) / "latest_checkpointed_iteration.txt"
    tracker.write_text("12\n")
    (said,) = refused("stage1", upcycled)
    assert said.startswith(f"{tracker} names iter_0000012, which is not there; choose one with ")
    tracker.write_text("soon")
    (said,) = refused("stage1", upcycled)
    assert said == f"{tracker} says 'soon'; expected an iteration or 'release'"
    (said,) = refused("stage1", upcycled, "--ckpt-step", "3")
    assert said == f"{upcycled} has no checkpoint of iteration 3; it holds no numbered ones"


def test_a_folder_to_load_that_is_empty_is_not_passed_over(upcycled: str, refused, tmp_path: Path) -> None:
    (said,) = refused("stage1", upcycled, "--load", str(tmp_path / "typo"), "--save", str(tmp_path / "run"))
    assert said.startswith(f"--load {tmp_path}/typo holds no checkpoint")


def test_stage_2_without_a_stage_1_is_said_and_not_refused(upcycled: str, make_checkpoint, accepted, capsys) -> None:
    sentence = f"moelpr: stage 2 starts from {upcycled}, which no run has trained"
    assert accepted("stage2", upcycled)["stage"] == "stage2"
    assert sentence in capsys.readouterr().err
    accepted("stage1", upcycled)
    accepted("stage2", make_checkpoint("trained", stage="stage1"))
    assert "no run has trained" not in capsys.readouterr().err
