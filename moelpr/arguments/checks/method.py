"""Flags that would change the method, contradict the stage, or be ignored."""

from collections.abc import Iterable

from moelpr.arguments.checks.run import Run
from moelpr.arguments.method import FIXED_FOR_MOE

# Flags that would make another model or trainer of it, or that nothing here reads, and what to do instead.
_NOT_HERE = {
    "yaml_cfg": "its file would replace every other setting; use --recipe",
    "spec": "the layers are this trainer's own; drop it",
    "vocab_size": "it comes from the checkpoint; drop it",
    "padded_vocab_size": "it follows from vocabulary and tensor-parallel size; drop it",
    "multi_latent_attention": "no checkpoint of this trainer has it; drop it",
    "mtp_num_layers": "no checkpoint of this trainer has such layers; drop it",
    "hybrid_layer_pattern": "no checkpoint of this trainer has such layers; drop it",
    "heterogeneous_layers_config_path": "no checkpoint of this trainer has such layers; drop it",
    "init_model_with_meta_device": "weights are loaded before such a model would get its memory; drop it",
    "load_main_params_from_ckpt": "main parameters start as copies of the model's; drop it",
    "moe_use_upcycling": "checkpoint_convert/hf_to_mcore.py --num-new-experts upcycles; drop it",
    "checkpoint_activations": "Megatron has replaced it; use --recompute-activations",
    "model_parallel_size": "Megatron has replaced it; use --tensor-model-parallel-size",
    "batch_size": "Megatron has replaced it; use --micro-batch-size",
    "warmup": "Megatron has replaced it; use --lr-warmup-fraction",
}


def flags_have_an_effect(run: Run) -> Iterable[str]:
    for name, instead in _NOT_HERE.items():
        is_the_models = name in run.shape  # a contradiction has its own check
        if name in run.typed and not is_the_models:
            yield f"{run.typed[name]} does not work here: {instead}"
    for name, flag in run.typed.items():
        if name.startswith("tokenizer_"):
            yield f"{flag} has no effect: the corpus holds token ids already; drop it"


def losses_belong_to_experts(run: Run) -> Iterable[str]:
    if run.args.stage != "dense":
        return
    for name in ("balance_loss_coeff", "lpr_loss_coeff", "train_everything", "save_trained_only"):
        if name in run.typed:
            yield f"{run.typed[name]} has no meaning for a dense model; drop it or use --stage stage1"


def loss_weights_are_not_negative(run: Run) -> Iterable[str]:
    for name in ("balance_loss_coeff", "lpr_loss_coeff"):
        value = getattr(run.args, name)
        if value is not None and not value >= 0:
            yield f"{run.typed[name]} {value} must be 0 (the loss is off) or above"


def the_method_is_moe_lpr(run: Run) -> Iterable[str]:
    if not run.is_moe:
        return
    for name, value in FIXED_FOR_MOE.items():
        found = getattr(run.args, name)
        if isinstance(found, list):
            found = ", ".join(found)
        if name in run.typed and found != value:
            yield f"{run.typed[name]} {found} does not work with the MoE-LPR layer; leave it at {value}"


def the_balance_weight_is_the_papers(run: Run) -> Iterable[str]:
    if run.is_moe and "moe_aux_loss_coeff" in run.typed:
        yield "--moe-aux-loss-coeff would be overwritten; use --balance-loss-coeff, which is converted to it"


def new_experts_have_no_low_precision(run: Run) -> Iterable[str]:
    for name in ("fp8", "fp4"):
        if run.is_moe and getattr(run.args, name):
            yield f"{run.typed[name]} does not reach the new experts, which have no {name.upper()} yet; drop it"


def something_is_frozen(run: Run) -> Iterable[str]:
    if run.is_moe and run.args.save_trained_only and run.args.train_everything:
        yield "--save-trained-only would leave nothing out, as --train-everything freezes nothing; drop one of them"


def precision_is_said_once(run: Run) -> Iterable[str]:
    given = [run.typed[name] for name in ("fp16", "bf16", "fp32") if name in run.typed]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; keep one of them"


def checkpoints_can_be_exported(run: Run) -> Iterable[str]:
    if run.args.ckpt_format != "torch_dist":
        yield (
            f"--ckpt-format {run.args.ckpt_format} can't be converted or moved to another layout; leave it at "
            "torch_dist"
        )


CHECKS = (
    flags_have_an_effect,
    losses_belong_to_experts,
    loss_weights_are_not_negative,
    the_method_is_moe_lpr,
    the_balance_weight_is_the_papers,
    new_experts_have_no_low_precision,
    something_is_frozen,
    precision_is_said_once,
    checkpoints_can_be_exported,
)
