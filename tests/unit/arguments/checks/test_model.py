"""Flags agree with the checkpoint, the method and the machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec, NewTokens


def test_each_stage_requires_the_right_kind_of_checkpoint(upcycled: str, dense: str, problems) -> None:
    (found,) = problems("stage2", dense)
    assert found.startswith("--stage stage2 ") and dense in found and "--num-new-experts" in found
    (found,) = problems("dense", upcycled)
    assert found.startswith("--stage dense ") and upcycled in found and "--stage stage1 or stage2" in found


@pytest.mark.parametrize(
    ("argv", "given", "expected"),
    [
        (["--moe-router-topk", "1"], "--moe-router-topk 1", "2"),
        (["--moe-router-topk=1"], "--moe-router-topk 1", "2"),
        (["--num-experts", "8"], "--num-experts 8", "4"),
        (["--num-original-experts", "2"], "--num-original-experts 2", "1"),
        (["--hidden-size", "64"], "--hidden-size 64", "32"),
        (["--norm-epsilon", "1e-5"], "--norm-epsilon 1e-05", "1e-06"),
        (["--untie-embeddings-and-output-weights"], "--untie-embeddings-and-output-weights True", "False"),
        (["--moe-layer-freq", "[0,1,1]"], "--moe-layer-freq [0, 1, 1]", "[1, 1, 1]"),
        (["--window-size", "8,0"], "--window-size (8, 0)", "None"),
        (["--use-rope-scaling"], "--use-rope-scaling True", "False"),
    ],
)
def test_a_flag_that_contradicts_the_model_is_rejected(
    upcycled: str, problems, argv: list[str], given: str, expected: str
) -> None:
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith(f"{given} contradicts the checkpoint {upcycled}")
    assert f"model_spec.json has {expected};" in found


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


@pytest.mark.parametrize("flag", ["--num-experts", "--num-original-experts"])
def test_a_dense_model_has_no_number_of_experts(dense: str, problems, flag: str) -> None:
    (found,) = problems("dense", dense, flag, "4")
    assert found.startswith(flag) and "--stage dense" in found


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
def test_rows_of_new_tokens_train_only_if_there_are_some(
    upcycled: str, grown: str, problems, accepted, stage: str, argv: list[str]
) -> None:
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
        ("stage0", ["--balance-loss-coeff", "0.01"]),
        ("stage0", ["--lpr-loss-coeff", "0.1"]),
        ("stage0", ["--train-everything"]),
        ("stage0", ["--defer-embedding-wgrad-compute"]),
        ("stage2", ["--defer-embedding-wgrad-compute"]),
        ("stage1", ["--defer-embedding-wgrad-compute"]),
        ("stage1", ["--train-everything", "--train-new-embeddings"]),
    ],
)
def test_flags_that_the_stage_or_new_rows_would_ignore_are_rejected(
    grown: str, problems, stage: str, argv: list[str]
) -> None:
    (found,) = problems(stage, grown, *argv)
    assert argv[0] in found and argv[-1 if stage == "stage1" else 0] in found and "remove" in found


def test_a_stage_1_that_leaves_new_rows_untrained_is_logged(
    grown: str, make_checkpoint, moe_spec: ModelSpec, accepted, capsys
) -> None:
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
        (["--moe-router-load-balancing-type", "sinkhorn"], "--moe-router-load-balancing-type must be aux_loss", ""),
        (["--moe-token-dispatcher-type", "allgather"], "--moe-token-dispatcher-type must be alltoall", "remove"),
        (["--moe-router-pre-softmax"], "--moe-router-pre-softmax must be False", "remove"),
        (["--moe-aux-loss-coeff=0.5"], "--moe-aux-loss-coeff", "--balance-loss-coeff"),
        (["--moe-token-dispatcher-type=flex"], "--moe-token-dispatcher-type must be alltoall", "will be"),
        (["--moe-enable-deepep"], "--moe-enable-deepep", "remove"),
        (["--mlp-chunks-for-training", "2"], "--mlp-chunks-for-training must be 1", "language bits"),
        (["--use-te-activation-func"], "--use-te-activation-func must be False", "remove"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl must be none", "docs/design/gpu.md"),
        (["--fp8-format", "hybrid"], "--fp8-format", "remove"),
        (["--fp4-format", "e2m1"], "--fp4-format", "remove"),
        (["--lpr-loss-coeff", "-0.1"], "--lpr-loss-coeff must be at least 0, got -0.1", "0"),
        (["--balance-loss-coeff", "nan"], "--balance-loss-coeff must be at least 0, got nan", "0"),
        (["--fp32", "--bf16"], "--bf16 and --fp32", "keep one"),
        (["--ckpt-format", "torch"], "--ckpt-format must be torch_dist", "remove"),
        (["--rerun-mode", "validate_results"], "--rerun-mode must be disabled", "NaN"),
        (["--rotary-interleaved"], "--rotary-interleaved must be False", "remove"),
        (["--softmax-type", "off-by-one"], "--softmax-type must be vanilla", "remove"),
        (["--overlap-dispatch-backward-with-experts-wgrad"], "--overlap-dispatch-backward-with", "no gradient"),
        (["--moe-mlp-glu-interleave-size", "32"], "--moe-mlp-glu-interleave-size must be None", "remove"),
        (["--sft"], "--sft", "remove"),
        (["--use-torch-fsdp2"], "--use-torch-fsdp2", "--use-distributed-optimizer"),
        (["--non-persistent-ckpt-type", "global"], "--non-persistent-ckpt-type", "--save-interval"),
        (["--save-trained-only", "--train-everything"], "--save-trained-only", "--train-everything"),
        (["--yaml-cfg", "a.yaml"], "--yaml-cfg", "--recipe"),
        (["--mtp-num-layers", "1"], "--mtp-num-layers", "remove"),
        (["--padded-vocab-size", "256"], "--padded-vocab-size", "remove"),
        (["--moe-use-upcycling"], "--moe-use-upcycling", "hf_to_mcore.py --num-new-experts"),
        (["--init-model-with-meta-device"], "--init-model-with-meta-device", "remove"),
        (["--load-main-params-from-ckpt"], "--load-main-params-from-ckpt", "remove"),
        (["--checkpoint-activations"], "--checkpoint-activations", "--recompute-activations"),
        (["--rampup-batch-size", "2", "2", "8"], "--rampup-batch-size", "--global-batch-size"),
        (["--step-batch-size-schedule", "0:1 100:2"], "--step-batch-size-schedule", "--global-batch-size"),
        (["--no-rope-freq", "2"], "--no-rope-freq must be None", "remove"),
        (["--window-attn-skip-freq", "2"], "--window-attn-skip-freq must be None", "remove"),
        (["--activation-func-clamp-value", "1"], "--activation-func-clamp-value must be None", "remove"),
        (["--qk-clip"], "--qk-clip must be False", "frozen attention"),
        (["--te-precision-config-file", "a.yaml"], "--te-precision-config-file must be None", "remove"),
        (["--enable-cuda-graph"], "--enable-cuda-graph is not supported", "remove"),
        (["--hybrid-override-pattern", "M*"], "--hybrid-override-pattern is not supported", "remove"),
        (["--freeze-all-layers"], "--freeze-all-layers is not supported", "remove"),
        (["--fim-data"], "--fim-data is not supported", "remove"),
        (["--qk-l2-norm"], "--qk-l2-norm is not supported", "remove"),
        (["--moe-apply-probs-on-input"], "--moe-apply-probs-on-input is not supported", "remove"),
        (["--phase-transition-iterations", "1"], "--phase-transition-iterations is not supported", "remove"),
        (["--save-dgrads-interval", "1"], "--save-dgrads-interval requires Transformer Engine", "remove"),
        (["--use-cpu-initialization"], "--use-cpu-initialization is not supported", "remove"),
        (["--tokenizer-model", "m"], "--tokenizer-model", "remove"),
    ],
)  # fmt: skip
def test_flags_that_would_change_the_method_or_be_ignored_are_rejected(
    upcycled: str, problems, argv: list[str], start: str, fix: str
) -> None:
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith(start) and fix in found


def test_the_only_valid_value_can_be_given(upcycled: str, accepted) -> None:
    argv = ["--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "aux_loss"]
    assert accepted("stage1", upcycled, *argv)["moe_token_dispatcher_type"] == "alltoall"


def test_a_dense_model_has_no_losses_of_the_method(dense: str, problems) -> None:
    flags = ["--balance-loss-coeff", "--lpr-loss-coeff", "--train-everything", "--save-trained-only"]
    found = problems("dense", dense, "--lpr-loss-coeff", "0.1", "--balance-loss-coeff", "0", *flags[2:])
    assert [line.split()[0] for line in found] == flags
    assert all("--stage stage1" in line for line in found)


def test_both_losses_can_be_combined(upcycled: str, accepted) -> None:
    settings = accepted("stage1", upcycled, "--lpr-loss-coeff", "0.2")
    assert (settings["balance_loss_coeff"], settings["lpr_loss_coeff"]) == (0.01, 0.2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--context-parallel-size", "--attention-dropout"],
        ["--moe-grouped-gemm"],
        ["--moe-permute-fusion"],
        ["--moe-router-fusion"],
        ["--use-precision-aware-optimizer", "--use-distributed-optimizer"],
        ["--recompute-modules", "--recompute-granularity"],
        ["--fp32-residual-connection"],
        ["--log-max-attention-logit"],
    ],
)
def test_flags_that_need_transformer_engine_are_rejected_without_it(
    upcycled: str, problems, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    from moelpr.arguments import kernels

    monkeypatch.setattr(kernels, "is_installed", lambda module: False)
    values = {
        "--context-parallel-size": ["2"], "--attention-dropout": ["0.1"], "--recompute-modules": ["layernorm"],
        "--recompute-granularity": ["selective"],
    }  # fmt: skip
    argv = [item for flag in flags for item in (flag, *values.get(flag, []))]
    found = problems("stage1", upcycled, *argv, ranks=2 if flags[0] == "--context-parallel-size" else 1)
    expected = [flag for flag in flags if flag not in ("--use-distributed-optimizer", "--recompute-granularity")]
    assert [line.split()[0] for line in found] == expected
    assert all("pip install --constraint constraints.txt " in line for line in found)
