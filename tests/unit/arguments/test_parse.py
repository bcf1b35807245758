"""From the command line to Megatron: everything wrong is said at once, and what is right arrives."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def test_everything_that_is_wrong_is_said_at_once(upcycled: str, refused) -> None:
    said = refused(
        "stage1", upcycled, "--lr", "fast", "--micro-batchsize", "3", "--num-layers", "8", "--moe-aux-loss-coeff=0.5",
        "--expert-model-parallel-size", "3", "--seq-length", "65", "--moe-token-dispatcher-type", "allgather",
        "--attention-dropout", "0.1", ranks=3,
    )  # fmt: skip
    wanted = (
        "--lr: invalid float value: 'fast'",
        "there is no flag --micro-batchsize; did you mean --micro-batch-size?",
        "--num-layers 8 contradicts the checkpoint",
        "4 new experts do not divide over --expert-model-parallel-size 3",
        "--seq-length 65 is longer than the model's 64 positions",
        "--moe-token-dispatcher-type allgather does not work",
        "--moe-aux-loss-coeff would be overwritten",
        "--attention-dropout needs Transformer Engine",
    )
    assert len(said) == len(wanted)
    for sentence in wanted:
        assert sum(line.startswith(sentence) for line in said) == 1, sentence


def test_a_wrong_stage_hides_nothing_about_the_experts(upcycled: str, refused) -> None:
    said = refused(None, upcycled, "--stage", "stage3", "--expert-model-parallel-size", "3", ranks=3)
    assert [line.split(";")[0] for line in said] == [
        "--stage: invalid choice: 'stage3' (choose from dense, stage1, stage2)",
        "4 new experts do not divide over --expert-model-parallel-size 3",
    ]


def test_one_thing_wrong_is_one_sentence(upcycled: str, refused) -> None:
    assert len(refused("stage1", upcycled, "--moe-aux-loss-coeff", "0.5")) == 1


@pytest.fixture
def make_run(upcycled: str) -> Callable:
    """A run in which `changed` settings have been put without any check."""
    from moelpr.arguments.checks.run import Run
    from moelpr.arguments.flags import all_arguments
    from moelpr.arguments.sources import Sources

    given_with = Sources.gather(["--pretrained-checkpoint", upcycled, "--seq-length", "32"], all_arguments())
    without = Sources.gather([], all_arguments())

    def make(stage: str | None, has_checkpoint: bool, ranks: int, **changed: int | None) -> Run:
        sources = given_with if has_checkpoint else without
        args = argparse.Namespace(**{**vars(sources.draft), "stage": stage, **changed})
        return dataclasses.replace(Run.of(args, sources), world_size=ranks)

    return make


# Flags whose default is None.
OPTIONAL = ("expert_tensor_parallel_size", "micro_batch_size", "global_batch_size", "seq_length", "train_iters")

NUMBERS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by", "micro_batch_size", "global_batch_size",
    "seq_length", "train_iters", "num_query_groups", "num_layers", "microbatch_group_size_per_vp_stage",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_check_stumbles_over_nonsense_elsewhere(make_run, data: st.DataObject) -> None:
    from moelpr.arguments.checks import complaints, notes

    stage = data.draw(st.sampled_from([None, "dense", "stage1", "stage2"]))
    values = st.one_of(st.sampled_from([0, -1, 1, 2, 3, 4, 10**9 + 7]), st.none())
    changed = {name: data.draw(values) for name in data.draw(st.sets(st.sampled_from(NUMBERS), max_size=6))}
    changed = {name: value for name, value in changed.items() if value is not None or name in OPTIONAL}
    run = make_run(
        stage=stage, has_checkpoint=data.draw(st.booleans()), ranks=data.draw(st.sampled_from([1, 2, 6, 8])), **changed
    )
    for sentence in [*complaints(run), *notes(run)]:
        assert sentence == sentence.strip()
        assert "\n" not in sentence


def test_a_missing_recipe_hides_no_other_mistake_and_invents_none(upcycled: str, refused) -> None:
    said = refused("stage1", upcycled, "--recipe", "nowhere.yaml", "--reset-attention-mask", steps=[], with_data=False)
    assert len(said) == 2
    assert "recipe nowhere.yaml" in said[0]
    assert said[1].startswith("--reset-attention-mask has no effect")


def test_megatrons_own_complaints_come_after_ours(upcycled: str, refused) -> None:
    overlap = "--overlap-param-gather"
    assert refused("stage1", upcycled, overlap) == [
        "Megatron refuses these arguments: --overlap-param-gather only supported with distributed optimizer, megatron "
        "fsdp, or dist_muon"
    ]
    assert all(
        "Megatron refuses" not in line for line in refused("stage1", upcycled, overlap, "--reset-attention-mask")
    )


def test_what_megatrons_config_refuses_is_known_before_anything_is_built(upcycled: str, refused) -> None:
    said = refused("stage1", upcycled, "--recompute-granularity", "full")
    assert said == [
        "Megatron refuses these arguments: Using recompute_granularity: full so recompute_method must be "
        '"block" or "uniform"'
    ]


def test_help_shows_our_flags_before_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    from moelpr.arguments import parse_arguments

    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.index("--lpr-loss-coeff") < shown.index("--num-layers")


def test_a_right_command_has_the_models_shape_and_the_stages_defaults(upcycled: str, accepted) -> None:
    final = accepted("stage1", upcycled)
    assert final["num_layers"] == 3
    assert final["num_experts"] == 4
    assert (final["balance_loss_coeff"], final["lpr_loss_coeff"]) == (0.01, 0.0)
    assert final["moe_aux_loss_coeff"] == pytest.approx(0.01 * 2 / 3)
    final = accepted("stage2", upcycled)
    assert (final["balance_loss_coeff"], final["lpr_loss_coeff"]) == (0.0, 0.1)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(
    upcycled: str, accepted, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 0.5\nweight-decay: 0.25\nlog-interval: 3\n")
    final = accepted("stage1", upcycled, "--recipe", str(recipe), "--weight-decay", "0.125")
    assert final["lr"] == 1e-3  # on the command line of every test
    assert final["weight_decay"] == 0.125
    assert final["log_interval"] == 3
    assert final["save_interval"] == 500


def test_a_vocabulary_is_padded_for_the_tensor_parallel_ranks(make_checkpoint, accepted) -> None:
    start = make_checkpoint("odd", shape={"vocab_size": 131})
    layout = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert accepted("stage1", start)["padded_vocab_size"] == 256
    assert accepted("stage1", start, *layout, ranks=2)["padded_vocab_size"] == 256
    small = ["--make-vocab-size-divisible-by", "1"]
    assert accepted("stage1", start, *small)["padded_vocab_size"] == 131
    assert accepted("stage1", start, *small, *layout, ranks=2)["padded_vocab_size"] == 132
    assert accepted("stage1", start, *small, *layout, ranks=2)["vocab_size"] == 131


@pytest.mark.parametrize(("rank", "is_said"), [("0", True), ("1", False)])
def test_tensor_parallelism_with_experts_switches_sequence_parallelism_on_and_says_so(
    upcycled: str, accepted, capsys, monkeypatch, rank: str, is_said: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    layout = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert accepted("stage1", upcycled, *layout, ranks=2)["sequence_parallel"] is True
    sentence = "moelpr: tensor parallelism with experts needs --sequence-parallel: switched on"
    assert (sentence in capsys.readouterr().err) == is_said
    assert accepted("stage1", upcycled, *layout, "--sequence-parallel", ranks=2)["sequence_parallel"] is True
    assert sentence not in capsys.readouterr().err


def test_a_dense_model_keeps_its_choice_of_sequence_parallelism(dense: str, accepted, capsys) -> None:
    assert accepted("dense", dense, "--tensor-model-parallel-size", "2", ranks=2)["sequence_parallel"] is False
    assert "switched on" not in capsys.readouterr().err
