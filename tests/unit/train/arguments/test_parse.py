import argparse
import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.training.argument_utils import core_transformer_config_from_args

from moelpr.model.layers.config import FIXED_FOR_MOE, MoELPRConfig
from moelpr.train.arguments.checks import find_notes, find_problems
from moelpr.train.arguments.checks.hardware import expected_memory
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.requested import RequestedRun


@pytest.fixture
def make_run(upcycled: str) -> Callable:
    """A run in which settings have been changed without any check."""
    argv = ["--pretrained-checkpoint", upcycled, "--seq-length", "32"]
    with_checkpoint = RequestedRun.gather(argv, all_arguments())
    without = RequestedRun.gather([], all_arguments())

    def make(stage: str | None, has_checkpoint: bool, ranks: int, **changed: int | None) -> RequestedRun:
        run = with_checkpoint if has_checkpoint else without
        args = argparse.Namespace(**{**vars(run.args), "stage": stage, **changed})
        return dataclasses.replace(run, args=args, world_size=ranks)

    return make


# Flags whose default is None, and others.
OPTIONAL = "expert_tensor_parallel_size micro_batch_size global_batch_size seq_length train_iters".split()
NUMBERS = (
    OPTIONAL
    + (
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
        "num_virtual_stages_per_pipeline_rank make_vocab_size_divisible_by "
        "num_query_groups num_layers microbatch_group_size_per_vp_stage"
    ).split()
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_check_fails_on_invalid_settings(make_run, data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from([None, "dense", "stage1", "stage2"]))
    values = st.one_of(st.sampled_from([0, -1, 1, 2, 3, 4, 10**9 + 7]), st.none())
    changed = {name: data.draw(values) for name in data.draw(st.sets(st.sampled_from(NUMBERS), max_size=6))}
    changed = {name: value for name, value in changed.items() if value is not None or name in OPTIONAL}
    run = make_run(stage, data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 6, 8])), **changed)
    for message in [*find_problems(run), *find_notes(run)]:
        assert message == message.strip() and "\n" not in message


def test_a_stage_without_layers_has_no_expected_memory(make_run) -> None:
    run = make_run("stage1", True, 1, num_virtual_stages_per_pipeline_rank=4, micro_batch_size=1)
    assert any("--num-virtual-stages-per-pipeline-rank 4 does not divide" in message for message in find_problems(run))
    assert expected_memory(run) is None


def test_a_missing_recipe_hides_no_other_problem_and_causes_none(upcycled: str, problems) -> None:
    flags = ("--recipe", "nowhere.yaml", "--reset-attention-mask")
    first, second = problems("stage1", upcycled, *flags, steps=False, with_data=False)
    assert "recipe nowhere.yaml; pass" in first and "paper-stage1" in first
    assert second.startswith("--reset-attention-mask ")


def test_what_the_method_fixes_is_set_and_the_balance_loss_is_a_mean_over_layers(checkpoint, accepted) -> None:
    """Megatron adds layers up."""
    final = accepted("stage1", checkpoint("upcycled"))
    assert {name: final[name] for name in FIXED_FOR_MOE} == FIXED_FOR_MOE
    assert final["moe_aux_loss_coeff"] == pytest.approx(0.01 * 2 / 3)
    assert accepted("stage1", checkpoint("some-layers"))["moe_aux_loss_coeff"] == pytest.approx(0.01 * 2 / 2)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_the_variant_of_the_lpr_loss_reaches_the_model(upcycled: str, accepted, variant: str) -> None:
    args = argparse.Namespace(**accepted("stage2", upcycled, "--lpr-loss", variant))
    assert core_transformer_config_from_args(args, config_class=MoELPRConfig).lpr_loss == variant


def test_the_command_line_overrides_the_recipe_and_the_recipe_overrides_defaults(upcycled, accepted, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 0.5\nweight-decay: 0.25\nlog-interval: 3\n")
    final = accepted("stage1", upcycled, "--recipe", str(recipe), "--weight-decay", "0.125")
    assert (final["lr"], final["weight_decay"]) == (1e-3, 0.125)  # the first is on the command line of every test
    assert (final["log_interval"], final["save_interval"]) == (3, 500)


@pytest.mark.parametrize(("rank", "is_logged"), [("0", True), ("1", False)])
def test_tensor_parallelism_with_experts_enables_sequence_parallelism_and_logs_it(
    upcycled: str, accepted, capsys, monkeypatch, rank: str, is_logged: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    layout = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert accepted("stage1", upcycled, *layout, ranks=2)["sequence_parallel"] is True
    assert ("enabled --sequence-parallel" in capsys.readouterr().err) == is_logged
    assert accepted("stage1", upcycled, *layout, "--sequence-parallel", ranks=2)["sequence_parallel"] is True
    assert "--sequence-parallel" not in capsys.readouterr().err
