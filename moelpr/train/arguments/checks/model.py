"""The model, the method and the machine: flags that contradict them, would change them, or would be ignored."""

from collections.abc import Iterable
from pathlib import Path

from moelpr.base.run_folder import HF_FOLDER
from moelpr.base.versions import install_command
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.layers.config import FIXED_FOR_MOE
from moelpr.model.stages import DENSE_STAGES, MOE_STAGES, UNTRAINED_ROUTERS
from moelpr.train.arguments import kernels, supported
from moelpr.train.arguments.flags import all_arguments, own_arguments, suggestion
from moelpr.train.arguments.requested import RequestedRun

# Parts of the model's description that training may change.
_FREE_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")

# Values of a model whose description does not mention them.
_ABSENT = {
    "window_size": None,
    "use_rope_scaling": False,
    "softmax_scale": None,
    "residual_multiplier": 1.0,
    "norms_after": False,
}

# Flags that a dense model or its stage would ignore.
_EXPERT_FLAGS = (
    "num_experts num_original_experts original_copies moe_router_topk moe_ffn_hidden_size moe_layer_freq "
    "balance_loss_coeff lpr_loss_coeff stage1_experts train_everything save_trained_only expert_model_parallel_size "
    "expert_tensor_parallel_size"
).split()

# Flags that stage 0 would ignore if they are not 0: it trains no routers, and decaying rows without gradient is not
# training them.
_NOT_IN_STAGE_0 = ("balance_loss_coeff", "lpr_loss_coeff", "weight_decay", "train_everything")


def check_checkpoint_kind(run: RequestedRun) -> Iterable[str]:
    """The stage fits the checkpoint: dense, or upcycled."""
    if run.spec is None:
        return
    if run.args.stage in DENSE_STAGES and run.spec.moe is not None:
        yield (
            f"--stage {run.args.stage} requires a dense checkpoint, but {run.checkpoint} has experts; use "
            "--stage stage1 or stage2, or convert the model with moelpr model convert --dense"
        )
    if run.args.stage in MOE_STAGES and run.spec.moe is None:
        yield (
            f"--stage {run.args.stage} requires an upcycled checkpoint, but {run.checkpoint} is dense; upcycle it with "
            "moelpr model convert --num-new-experts N"
        )
    elif run.args.stage in MOE_STAGES and run.spec.moe is not None and run.spec.moe.topk == 1:
        yield f"--stage {run.args.stage} cannot train {run.checkpoint}: {UNTRAINED_ROUTERS}"


def check_model_flags(run: RequestedRun) -> Iterable[str]:
    """Flags that contradict the checkpoint: one of the two would be ignored."""
    shape = (_ABSENT | run.shape) if run.shape else {}
    for name, value in shape.items():
        setting = getattr(run.args, name)
        is_known = value is not None or name in _ABSENT
        if name in run.explicit_args and name not in _FREE_SHAPE and is_known and setting != value:
            yield (
                f"{run.flag(name)} {setting} contradicts the checkpoint {run.checkpoint}, whose model_spec.json has "
                f"{value}; remove the flag, or convert the model again"
            )


def check_supported_flags(run: RequestedRun) -> Iterable[str]:
    """Flags of Megatron are tested with this trainer, or allowed by --allow-untested, whose flags exist."""
    allowed, known = _allowed(run), [flag.removeprefix("--") for flag in all_arguments().flags()]
    for flag in allowed:
        if flag not in known:
            yield f"--allow-untested {flag}: Megatron has no such flag; {suggestion(flag, known)}"
    for flag, name in _other_flags(run):
        if flag in supported.REFUSED:
            yield f"--{flag} is not supported: {supported.REFUSED[flag]}"
        elif run.is_moe and name in FIXED_FOR_MOE:
            yield f"--{flag} is not supported: the layers with experts fix or lack it (docs/design/gpu.md); remove it"
        elif flag not in allowed:
            yield f"--{flag} is not tested with this trainer; remove it, or pass --allow-untested {flag} too"


def note_untested_flags(run: RequestedRun) -> Iterable[str]:
    """Flags that are accepted without a test."""
    if flags := [f"--{flag}" for flag, _ in _other_flags(run) if flag in _allowed(run)]:
        yield f"warning: nobody has tested {', '.join(flags)} with this trainer (--allow-untested)"


def _allowed(run: RequestedRun) -> list[str]:
    return [flag.removeprefix("--") for flag in run.args.allow_untested or ()]


def _other_flags(run: RequestedRun) -> Iterable[tuple[str, str]]:
    """The given flags, without dashes, that are neither ours nor supported, and change something; and their names."""
    unchanged = vars(run.defaults) | (FIXED_FOR_MOE if run.is_moe else {})
    checked = {*own_arguments().flags(), *(f"--{flag}" for flag in supported.SUPPORTED)}
    for flag, name in run.given.items():
        if flag in checked or name in run.shape or name in _ABSENT or name in _EXPERT_FLAGS:
            continue
        value = getattr(run.args, name)
        if unchanged.get(name) not in (value, value[0] if isinstance(value, list) else value):
            yield flag[2:], name


def check_method(run: RequestedRun) -> Iterable[str]:
    """Flags that the MoE-LPR layer or the stage would ignore."""
    args, explicit = run.args, run.explicit_args
    if args.stage in DENSE_STAGES:
        for name in _EXPERT_FLAGS:
            is_size_1 = name.endswith("parallel_size") and getattr(args, name) == 1
            if name in explicit and not is_size_1:
                yield f"{run.flag(name)} does not apply to --stage {args.stage}; remove it, or use --stage stage1"
    if run.is_moe and args.save_trained_only and args.train_everything:
        yield "--save-trained-only has no effect with --train-everything, which freezes nothing; remove one of them"


def check_stage1_experts(run: RequestedRun) -> Iterable[str]:
    """Tokens can be kept from original experts in stage 1 only, if nothing needs those places."""
    args = run.args
    if args.stage1_experts == "all":
        return
    if args.stage not in ("stage1", None):
        yield f"--stage1-experts new applies to --stage stage1, not to {args.stage}, which routes over all; remove it"
        return
    if args.train_everything:
        yield "--stage1-experts new keeps tokens from the original experts, which --train-everything trains; remove one"
    if run.lpr_loss_coeff:
        yield (
            f"--lpr-loss-coeff {run.lpr_loss_coeff:g} sends tokens to the original experts, which --stage1-experts new "
            "keeps them from; remove one of them"
        )
    moe = run.spec.moe if run.spec else None
    if moe is not None and moe.num_new_experts < moe.topk:
        yield (
            f"--stage1-experts new requires at least as many new experts as a token chooses, but {run.checkpoint} has "
            f"{moe.num_new_experts} and top-k {moe.topk}; remove it, or convert with a smaller --topk"
        )


def check_new_tokens(run: RequestedRun) -> Iterable[str]:
    """Rows of new tokens train where there are some, and in a stage that can train them."""
    args = run.args
    trains = "--stage stage0" if args.stage == "stage0" else "--train-new-embeddings"
    if (args.stage == "stage0" or args.train_new_embeddings) and run.spec is not None and run.spec.new_tokens is None:
        yield (
            f"{trains} requires a model with new tokens, but {run.checkpoint} has none; convert the model with "
            "moelpr model convert --extended-tokenizer DIR"
        )
    if args.train_new_embeddings and args.stage not in ("stage1", None):
        does = "trains them anyway" if args.stage in ("stage0", "dense") else "does not train them"
        yield f"--train-new-embeddings applies to --stage stage1, and --stage {args.stage} {does}; remove it"
    if args.train_new_embeddings and args.train_everything:
        yield "--train-new-embeddings has no effect with --train-everything, which freezes nothing; remove one of them"
    for name in _NOT_IN_STAGE_0 if args.stage == "stage0" else ():
        if name in run.explicit_args and getattr(args, name):
            yield f"{run.flag(name)} does not apply to --stage stage0, which trains only rows of new tokens; remove it"


def check_transformer_engine(run: RequestedRun) -> Iterable[str]:
    """Flags that need Transformer Engine, or PyTorch's attention in place of it."""
    args = run.args
    is_local = args.transformer_impl == "local"
    if run.shape.get("norms_after") and not is_local:
        yield "Transformer Engine fuses other norms than OLMo 2's (norms_after); add --transformer-impl local"
    if args.dataloader_inter_document_masking and not is_local:
        yield "--dataloader-inter-document-masking does not support Transformer Engine; add --transformer-impl local"
    flags = {
        "--context-parallel-size": is_local and args.context_parallel_size > 1,
        "--attention-dropout": is_local and args.attention_dropout > 0,
        "--moe-grouped-gemm": is_local and run.is_moe and args.moe_grouped_gemm,
        "--moe-permute-fusion": is_local and run.is_moe and args.moe_permute_fusion,
        "--moe-router-fusion": is_local and run.is_moe and args.moe_router_fusion,
        "--recompute-modules layernorm": is_local and "layernorm" in (args.recompute_modules or ()),
        "--log-max-attention-logit": is_local and args.log_max_attention_logit,
        "--fp32-residual-connection": is_local and args.fp32_residual_connection,
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer
        and not (args.optimizer_cpu_offload or args.bf16_moments)
        and not kernels.is_installed("transformer_engine"),
    }
    for flag in (flag for flag, is_set in flags.items() if is_set):
        yield f"{flag} requires Transformer Engine; install it with {install_command('gpu')}, or remove the flag"


def note_untrained(run: RequestedRun) -> Iterable[str]:
    """Not errors: stage 2 of untrained experts, and stage 1 of a model whose new tokens keep the means they had."""
    lineage = run.checkpoint and Lineage.read_if_there(Path(run.checkpoint) / HF_FOLDER)
    has_trained_ffns = bool(lineage and lineage.settings.get("ffns_of"))  # new experts are FFNs that were trained alone
    if run.args.stage in ("stage2", "sft") and run.record is None and not has_trained_ffns:
        yield (
            f"warning: --pretrained-checkpoint {run.checkpoint} has not been through stage 1, so its new experts are "
            "untrained copies; pass the --save folder of stage 1"
        )
    is_untrained = run.spec is not None and run.spec.new_tokens is not None and run.record is None
    if is_untrained and run.args.stage == "stage1" and not run.args.train_new_embeddings:
        yield (
            f"warning: the rows of new tokens in {run.checkpoint} are untrained means, and stay so; run stage0 first, "
            "or add --train-new-embeddings"
        )


def note_second_round(run: RequestedRun) -> Iterable[str]:
    """Corpora do not record the round they were tagged for."""
    if run.is_moe and (m := run.shape["num_original_experts"]) > 1:
        yield (
            f"{run.checkpoint} has {m} original experts; if an earlier round added languages, their text is now "
            "original-language text, language bit 1: preprocess its corpora again"
        )
        if run.args.stage1_experts == "new":
            yield "with --stage1-experts new, tokens cannot choose the experts of earlier rounds either until stage 2"
