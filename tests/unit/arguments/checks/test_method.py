"""Flags that would change the method, contradict the stage, or be ignored."""

import pytest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe-router-load-balancing-type", "sinkhorn"],
         "--moe-router-load-balancing-type sinkhorn does not work with the MoE-LPR layer; leave it at aux_loss"),
        (["--moe-token-dispatcher-type", "allgather"],
         "--moe-token-dispatcher-type allgather does not work with the MoE-LPR layer; leave it at alltoall"),
        (["--moe-token-dispatcher-type=flex"],
         "--moe-token-dispatcher-type flex does not work with the MoE-LPR layer; leave it at alltoall"),
        (["--moe-router-pre-softmax"],
         "--moe-router-pre-softmax True does not work with the MoE-LPR layer; leave it at False"),
        (["--moe-aux-loss-coeff=0.5"],
         "--moe-aux-loss-coeff would be overwritten; use --balance-loss-coeff, which is converted to it"),
        (["--fp8-format", "hybrid"], "--fp8-format does not reach the new experts, which have no FP8 yet; drop it"),
        (["--fp4-format", "e2m1"], "--fp4-format does not reach the new experts, which have no FP4 yet; drop it"),
        (["--lpr-loss-coeff", "-0.1"], "--lpr-loss-coeff -0.1 must be 0 (the loss is off) or above"),
        (["--balance-loss-coeff", "nan"], "--balance-loss-coeff nan must be 0 (the loss is off) or above"),
        (["--fp32", "--bf16"], "--bf16 and --fp32 exclude each other; keep one of them"),
        (["--ckpt-format", "torch"],
         "--ckpt-format torch can't be converted or moved to another layout; leave it at torch_dist"),
        (["--save-trained-only", "--train-everything"],
         "--save-trained-only would leave nothing out, as --train-everything freezes nothing; drop one of them"),
        (["--yaml-cfg", "a.yaml"],
         "--yaml-cfg does not work here: its file would replace every other setting; use --recipe"),
        (["--mtp-num-layers", "1"],
         "--mtp-num-layers does not work here: no checkpoint of this trainer has such layers; drop it"),
        (["--padded-vocab-size", "256"],
         "--padded-vocab-size does not work here: it follows from vocabulary and tensor-parallel size; drop it"),
        (["--moe-use-upcycling"], "--moe-use-upcycling does not work here: checkpoint_convert/hf_to_mcore.py "
         "--num-new-experts upcycles; drop it"),
        (["--init-model-with-meta-device"], "--init-model-with-meta-device does not work here: weights are loaded "
         "before such a model would get its memory; drop it"),
        (["--load-main-params-from-ckpt"], "--load-main-params-from-ckpt does not work here: main parameters start as "
         "copies of the model's; drop it"),
        (["--checkpoint-activations"], "--checkpoint-activations does not work here: Megatron has replaced it; use "
         "--recompute-activations"),
        (["--tokenizer-model", "m"], "--tokenizer-model has no effect: the corpus holds token ids already; drop it"),
    ],
)  # fmt: skip
def test_settings_that_would_change_the_method_or_be_ignored_are_refused(
    upcycled: str, refused, words: list[str], said: str
) -> None:
    assert refused("stage1", upcycled, *words) == [said]


def test_the_one_right_value_may_be_typed(upcycled: str, accepted) -> None:
    words = ["--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "aux_loss"]
    assert accepted("stage1", upcycled, *words)["moe_token_dispatcher_type"] == "alltoall"


def test_a_dense_model_has_no_losses_of_the_method(dense: str, refused) -> None:
    words = ["--lpr-loss-coeff", "0.1", "--balance-loss-coeff", "0", "--train-everything", "--save-trained-only"]
    assert refused("dense", dense, *words) == [
        f"{flag} has no meaning for a dense model; drop it or use --stage stage1"
        for flag in ("--balance-loss-coeff", "--lpr-loss-coeff", "--train-everything", "--save-trained-only")
    ]


def test_both_losses_may_be_used_together(upcycled: str, accepted) -> None:
    settings = accepted("stage1", upcycled, "--lpr-loss-coeff", "0.2")
    assert (settings["balance_loss_coeff"], settings["lpr_loss_coeff"]) == (0.01, 0.2)
