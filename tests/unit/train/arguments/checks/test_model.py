"""Flags agree with the checkpoint, the method and the machine."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from moelpr.model.model_spec import ModelSpec, NewTokens
from moelpr.train.arguments.checks.model import check_transformer_engine


def test_each_stage_requires_the_right_kind_of_checkpoint(upcycled: str, dense: str, problems) -> None:
    (found,) = problems("stage2", dense)
    assert found.startswith("--stage stage2 ") and dense in found and "--num-new-experts" in found
    (found,) = problems("dense", upcycled)
    assert found.startswith("--stage dense ") and upcycled in found and "--stage stage1 or stage2" in found


@pytest.mark.parametrize(
    ("argv", "given", "expected"),
    [
        (["--moe-router-topk", "1"], "--moe-router-topk 1", "2"),
        (["--untie-embeddings-and-output-weights"], "--untie-embeddings-and-output-weights True", "False"),
        (["--moe-layer-freq", "[0,1,1]"], "--moe-layer-freq [0, 1, 1]", "[1, 1, 1]"),
        (["--window-size", "8,0"], "--window-size (8, 0)", "None"),
        (["--use-rope-scaling"], "--use-rope-scaling True", "False"),
        (["--softmax-scale", "0.5"], "--softmax-scale 0.5", "None"),
        (["--residual-multiplier", "0.5"], "--residual-multiplier 0.5", "1.0"),
        (["--norms-after"], "--norms-after True", "False"),
    ],
)
def test_a_flag_that_contradicts_the_model_is_rejected(upcycled, problems, argv, given, expected) -> None:
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith(f"{given} contradicts the checkpoint {upcycled}")
    assert f"model_spec.json has {expected};" in found


def test_the_norms_of_olmo_2_need_all_heads_and_torch(make_checkpoint, moe_spec: ModelSpec, problems) -> None:
    args = moe_spec.megatron_args | {"norms_after": True, "qk_layernorm": True}
    olmo = make_checkpoint("olmo", replace(moe_spec, megatron_args=args))
    found = problems("stage1", olmo, "--tensor-model-parallel-size", "2")
    assert any("--tensor-model-parallel-size 2 would split the heads" in problem for problem in found)
    engine = MagicMock(transformer_impl="transformer_engine", dataloader_inter_document_masking=False)
    found = list(check_transformer_engine(MagicMock(args=engine, shape=args)))
    assert any("than OLMo 2's (norms_after); add --transformer-impl local" in problem for problem in found)


def test_a_flag_that_repeats_the_model_is_accepted(upcycled: str, accepted) -> None:
    assert accepted("stage1", upcycled, "--num-experts", "4", "--moe-layer-freq", "[1,1,1]")["num_experts"] == 4


def test_the_number_of_original_experts_comes_from_the_checkpoint(
    make_checkpoint, moe_spec: ModelSpec, accepted, problems, capsys
) -> None:
    spec = replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=3))
    second_round = make_checkpoint("second-round", spec)
    assert accepted("stage1", second_round)["num_original_experts"] == 3
    assert f"{second_round} has 3 original experts" in capsys.readouterr().err
    accepted("stage1", make_checkpoint("first"))
    assert "original experts" not in capsys.readouterr().err
    assert accepted("stage1", second_round, "--num-original-experts", "3")["num_original_experts"] == 3
    (found,) = problems("stage1", second_round, "--num-original-experts", "1")
    assert found.startswith(f"--num-original-experts 1 contradicts the checkpoint {second_round}")


def test_missing_weights_are_reported_before_anything_is_built(upcycled: str, problems) -> None:
    tracker = Path(upcycled) / "latest_checkpointed_iteration.txt"
    tracker.write_text("12\n")
    (found,) = problems("stage1", upcycled)
    assert str(tracker) in found and "iter_0000012" in found and "--ckpt-step" in found
    tracker.write_text("soon")
    (found,) = problems("stage1", upcycled)
    assert str(tracker) in found and "'soon'" in found
    (found,) = problems("stage1", upcycled, "--ckpt-step", "3")
    assert upcycled in found and "iteration 3" in found


@pytest.fixture
def grown(make_checkpoint, moe_spec: ModelSpec) -> str:
    tokens = NewTokens(first=120, number=20, base_vocab_size=128)
    spec = replace(moe_spec, megatron_args=moe_spec.megatron_args | {"vocab_size": 140}, new_tokens=tokens)
    return make_checkpoint("grown", spec)


@pytest.mark.parametrize(("stage", "argv"), [("stage0", []), ("stage1", ["--train-new-embeddings"])])
def test_rows_of_new_tokens_train_only_if_there_are_some(upcycled, grown, problems, accepted, stage, argv) -> None:
    (found,) = problems(stage, upcycled, *argv)
    assert found.startswith((argv or ["--stage stage0"])[0]) and upcycled in found and "--extended-tokenizer" in found
    settings = accepted(stage, grown, *argv)
    assert settings["vocab_size"] == 140 and settings["lpr_loss_coeff"] == 0
    assert settings["balance_loss_coeff"] == (0.01 if stage == "stage1" else 0)


@pytest.mark.parametrize("stage", ["stage0", "stage2"])
def test_only_stage_1_has_new_embeddings_as_an_option(grown: str, problems, stage: str) -> None:
    (found,) = problems(stage, grown, "--train-new-embeddings")
    assert found.startswith("--train-new-embeddings applies to --stage stage1") and stage in found


@pytest.mark.parametrize(
    ("stage", "argv"),
    [
        ("stage0", ["--weight-decay", "0.1"]),
        ("stage0", ["--train-everything"]),
        ("stage0", ["--defer-embedding-wgrad-compute"]),
        ("stage1", ["--train-everything", "--train-new-embeddings"]),
    ],
)
def test_flags_that_the_stage_or_new_rows_would_ignore_are_rejected(grown, problems, stage, argv) -> None:
    (found,) = problems(stage, grown, *argv)
    assert argv[0] in found and argv[-1 if stage == "stage1" else 0] in found and "remove" in found


def test_a_stage_1_that_leaves_new_rows_untrained_is_logged(grown, make_checkpoint, moe_spec, accepted, capsys) -> None:
    accepted("stage1", grown)
    assert f"the rows of new tokens in {grown} are untrained" in capsys.readouterr().err
    accepted("stage1", grown, "--train-new-embeddings")
    accepted("stage0", grown, "--weight-decay", "0")
    assert "untrained" not in capsys.readouterr().err


def test_stage_2_without_stage_1_is_logged_and_not_rejected(upcycled: str, make_checkpoint, accepted, capsys) -> None:
    message = f"moelpr: warning: --pretrained-checkpoint {upcycled} "
    assert accepted("stage2", upcycled)["stage"] == "stage2"
    assert message in capsys.readouterr().err
    accepted("stage1", upcycled)
    accepted("stage2", make_checkpoint("trained", stage="stage1"))
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "start", "fix"),
    [
        ("--lpr-loss-coeff -0.1", "--lpr-loss-coeff must be at least 0, got -0.1", "0"),
        ("--fp32 --bf16", "--bf16 and --fp32", "keep one"),
        ("--save-trained-only --train-everything", "--save-trained-only", "--train-everything"),
        ("--save-dgrads-interval 1", "--save-dgrads-interval requires Transformer Engine", "remove"),
        ("--yaml-cfg a.yaml", "--yaml-cfg is not supported", "--recipe"),
        ("--qk-clip", "--qk-clip is not supported", "frozen attention"),
        ("--moe-router-pre-softmax", "--moe-router-pre-softmax is not supported", "remove"),
        ("--fim-data", "--fim-data is not tested with this trainer", "--allow-untested fim-data"),
    ],
)
def test_flags_that_would_change_the_method_or_be_ignored_are_rejected(upcycled, problems, argv, start, fix) -> None:
    (found,) = problems("stage1", upcycled, *argv.split())
    assert found.startswith(start) and fix in found


def test_no_flag_that_contradicts_the_method_can_be_allowed(upcycled: str, problems) -> None:
    flags = "--qk-clip --moe-use-upcycling --ckpt-format torch --reset-attention-mask"
    allowed = "--allow-untested qk-clip moe-use-upcycling ckpt-format --allow-untested reset-attention-mask"
    found = problems("stage1", upcycled, *flags.split(), *allowed.split())
    assert len(found) == 4 and all("is not supported: " in line for line in found)


def test_an_untested_flag_is_accepted_on_request_with_a_warning(upcycled, accepted, problems, capsys, tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("no-log-loss-scale-to-tensorboard: true\nallow-untested: [no-log-loss-scale-to-tensorboard]\n")
    argv = ["--recipe", str(recipe), "--empty-unused-memory-level", "1"]
    final = accepted("stage1", upcycled, *argv, "--allow-untested", "empty-unused-memory-level")
    assert final["empty_unused_memory_level"] == 1
    assert final["allow_untested"] == ["no-log-loss-scale-to-tensorboard", "empty-unused-memory-level"]
    warning = "nobody has tested --no-log-loss-scale-to-tensorboard, --empty-unused-memory-level with this trainer"
    assert warning in capsys.readouterr().err
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith("--empty-unused-memory-level is not tested") and "--allow-untested empty-un" in found
    (found,) = problems("stage1", upcycled, "--allow-untested", "empty-unused-memory")
    assert "did you mean empty-unused-memory-level?" in found


def test_a_value_that_the_trainer_uses_anyway_can_be_given(upcycled: str, accepted) -> None:
    argv = "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --ckpt-format torch_dist"
    assert accepted("stage1", upcycled, *argv.split())["moe_token_dispatcher_type"] == "alltoall"


@pytest.mark.parametrize(
    ("stage", "argv", "words"),
    [
        ("stage2", [], ["--stage stage1", "stage2", "remove"]),
        ("stage1", ["--train-everything"], ["--train-everything", "remove"]),
        ("stage1", ["--lpr-loss-coeff", "0.1"], ["--lpr-loss-coeff 0.1", "remove"]),
    ],
)
def test_new_experts_only_is_for_stage_1_alone(upcycled: str, problems, stage, argv, words) -> None:
    (found,) = problems(stage, upcycled, "--stage1-experts", "new", *argv)
    assert all(word in found for word in words), found


def test_a_token_needs_as_many_new_experts_as_it_chooses(make_checkpoint, moe_spec, problems, accepted, capsys) -> None:
    few = replace(moe_spec, moe=replace(moe_spec.moe, num_new_experts=1))
    (found,) = problems("stage1", make_checkpoint("few", few), "--stage1-experts", "new")
    assert "has 1 and top-k 2" in found and "--topk" in found
    later = make_checkpoint("later", replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=2)))
    assert accepted("stage1", later, "--stage1-experts", "new")["stage1_experts"] == "new"
    assert "cannot choose the experts of earlier rounds" in capsys.readouterr().err


def test_a_dense_model_has_no_losses_of_the_method(dense: str, problems) -> None:
    flags = ["--balance-loss-coeff", "--lpr-loss-coeff", "--train-everything", "--save-trained-only"]
    found = problems("dense", dense, "--lpr-loss-coeff", "0.1", "--balance-loss-coeff", "0", *flags[2:])
    assert [line.split()[0] for line in found] == flags
    assert all("--stage stage1" in line for line in found)


@pytest.mark.parametrize(
    "flags",
    [
        ["--context-parallel-size", "--attention-dropout"],
        ["--moe-grouped-gemm"],
        ["--use-precision-aware-optimizer", "--use-distributed-optimizer"],
        ["--recompute-modules", "--recompute-granularity"],
    ],
)
def test_flags_that_need_transformer_engine_are_rejected_without_it(upcycled, problems, monkeypatch, flags) -> None:
    from moelpr.train.arguments import kernels

    monkeypatch.setattr(kernels, "is_installed", lambda module: False)
    values = {"--context-parallel-size": ["2"], "--attention-dropout": ["0.1"]}
    values |= {"--recompute-modules": ["layernorm"], "--recompute-granularity": ["selective"]}
    argv = [item for flag in flags for item in (flag, *values.get(flag, []))]
    found = problems("stage1", upcycled, *argv, ranks=2 if flags[0] == "--context-parallel-size" else 1)
    expected = [flag for flag in flags if flag not in ("--use-distributed-optimizer", "--recompute-granularity")]
    assert [line.split()[0] for line in found] == expected
    assert all("pip install --constraint constraints.txt " in line for line in found)
