"""A run resumes with its own model and stage, and where its optimizer state fits."""

from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec, MoeSpec

TP, PP, EP, ETP = (
    f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "expert-model", "expert-tensor")
)
FLAT = {"use_distributed_optimizer": True}
RESHARDABLE = {**FLAT, "dist_ckpt_optim_fully_reshardable": True}


def test_a_run_of_another_stage_is_not_resumed(upcycled: str, make_checkpoint, refused) -> None:
    run = make_checkpoint("run", stage="stage1")
    (said,) = refused("stage2", upcycled, "--save", run)
    assert said.startswith(f"{run} holds a run of --stage stage1, which --stage stage2 cannot resume; give another")


def test_the_converters_folder_is_not_taken_for_a_run(upcycled: str, refused) -> None:
    (said,) = refused("stage1", None, "--save", f"{upcycled}/")
    assert said.startswith(f"{upcycled} holds a checkpoint but no run to resume; give another folder to --save")


def test_a_run_of_another_model_is_not_resumed(make_checkpoint, dense_spec: ModelSpec, refused) -> None:
    run = make_checkpoint("run", stage="stage1")
    other = ModelSpec("llama", "float32", {**dense_spec.megatron_args, "num_layers": 2}, MoeSpec(8, 2, (0, 1), 5))
    start = make_checkpoint("other", other)
    (said,) = refused("stage1", start, "--save", run)
    assert said.startswith(
        f"{run} holds a run of another model than --pretrained-checkpoint {start} (family llama there, qwen2 here; "
        "original experts 5 there, 1 here; new experts 8 there, 4 here; MoE layers (0, 1) there, (0, 1, 2) here; "
        "num_layers 2 there, 3 here); give another"
    )


@pytest.mark.parametrize(("before", "now"), [(True, []), (False, ["--save-trained-only"])])
def test_a_run_keeps_saving_what_it_saved_before(make_checkpoint, refused, before: bool, now: list[str]) -> None:
    run = make_checkpoint("run", stage="stage1", save_trained_only=before)
    (said,) = refused("stage1", None, "--save", run, *now)
    assert said.startswith(f"{run} was saved {'with' if before else 'without'} --save-trained-only; resume it the same")


def test_the_first_start_may_be_gone_by_now(make_checkpoint, accepted, tmp_path: Path) -> None:
    run = make_checkpoint("run", stage="stage1")
    assert accepted("stage1", tmp_path / "deleted", "--save", run)["model_source"] == run


@pytest.mark.parametrize("flag", ["--load", "--finetune"])
def test_a_run_is_not_started_over_the_checkpoints_of_another(make_checkpoint, refused, accepted, flag: str) -> None:
    run, other = make_checkpoint("run", stage="stage1"), make_checkpoint("other", stage="stage1")
    start = [flag, other] if flag == "--load" else [flag]
    (said,) = refused("stage1", None, "--save", run, *start)
    assert said.startswith(f"--save {run} holds checkpoints of a run, and {flag} would start another one over them")
    new = f"{run}-new"
    assert accepted("stage1", other, "--save", new, "--load", run)["is_resumed"]
    assert not accepted("stage1", other, "--save", new, "--load", run, "--finetune")["is_resumed"]


SCHEDULE = {"stage": "stage1", "min_lr": 0.0}


def test_another_schedule_is_noticed_before_megatrons_assertion(make_checkpoint, refused, accepted) -> None:
    run = make_checkpoint("run", **SCHEDULE)
    (said,) = refused("stage1", None, "--save", run, "--train-iters", "4", "--min-lr", "1e-4")
    assert said.startswith(
        f"{run} was trained with --min-lr 0.0, --train-iters 2, which its learning-rate schedule rests on, not "
        "--min-lr 0.0001, --train-iters 4; keep it, or add --override-opt-param-scheduler"
    )
    start = f"{run}-start"
    for flag in ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler", "--no-load-optim"):
        assert accepted("stage1", start, "--save", run, "--train-iters", "4", flag)["train_iters"] == 4
    assert accepted("stage1", start, "--save", run)["is_resumed"]


def test_a_longer_training_keeps_a_decay_that_is_said_apart(make_checkpoint, accepted) -> None:
    run = make_checkpoint("run", **SCHEDULE, lr_decay_iters=2)
    assert accepted("stage1", f"{run}-start", "--save", run, "--lr-decay-iters", "2", "--train-iters", "4")


# before: recipe.yaml of the run; now: flags and processes. `fits` None: it loads; else what the sentence names.
TABLE = {
    "more processes": ({}, [], 2, None),
    "experts spread out": ({}, [EP, "2"], 2, None),
    "experts gathered": ({"expert_model_parallel_size": 2}, [], 1, None),
    "experts spread further": ({"expert_model_parallel_size": 2}, [EP, "4"], 4, None),
    "experts no longer split with the model": ({}, [TP, "2", ETP, "1"], 2, None),
    "a pipeline": ({}, [PP, "3"], 3, None),
    "flat buffers, more processes": (FLAT, ["--use-distributed-optimizer"], 2, None),
    "flat buffers, a pipeline": (FLAT, ["--use-distributed-optimizer", PP, "3"], 3, "--pipeline-model-parallel-size 1"),
    "flat buffers, experts spread further": (
        {**FLAT, "expert_model_parallel_size": 2}, ["--use-distributed-optimizer", EP, "4"], 4,
        "--expert-model-parallel-size 2",
    ),
    "flat buffers, virtual stages": (
        {**FLAT, "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": 3},
        ["--use-distributed-optimizer"], 1, "virtual pipeline stages 3",
    ),
    "flat buffers, overlap": (
        FLAT, ["--use-distributed-optimizer", "--overlap-grad-reduce"], 1, "no --overlap-grad-reduce",
    ),
    "reshardable, a pipeline": (RESHARDABLE, ["--use-distributed-optimizer", PP, "3"], 3, None),
    "reshardable, experts spread out": (RESHARDABLE, ["--use-distributed-optimizer", EP, "2"], 2, None),
    "another optimizer": ({}, ["--use-distributed-optimizer"], 1, "no --use-distributed-optimizer"),
    "state was not saved": ({**FLAT, "no_save_optim": True}, [EP, "2"], 2, None),
    "state is not asked for": (FLAT, ["--no-load-optim", EP, "2"], 2, None),
    "another set of trained parameters": ({}, ["--train-everything"], 1, "no --train-everything"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_optimizer_state_of_stage_1_is_taken_up_where_it_fits(
    upcycled: str, make_checkpoint, refused, accepted, case: str
) -> None:
    before, words, ranks, kept = TABLE[case]
    run = make_checkpoint("run", stage="stage1", **before)
    words = ["--save", run, *words]
    if kept is None:
        assert accepted("stage1", upcycled, *words, ranks=ranks)["model_source"] == run
        return
    (said,) = refused("stage1", upcycled, *words, ranks=ranks)
    assert said.startswith(f"{run} was trained with ")
    assert f" {kept}" in said
    assert "; its optimizer state does not fit " in said
    assert "start the optimizer afresh with --no-load-optim" in said
    assert ("--dist-ckpt-optim-fully-reshardable can change" in said) == case.startswith("flat buffers")


def test_where_routers_alone_train_the_experts_layout_is_free(upcycled: str, make_checkpoint, accepted) -> None:
    run = make_checkpoint("run", stage="stage2")
    assert accepted("stage2", upcycled, "--save", run, EP, "2", ranks=2)["expert_model_parallel_size"] == 2
