"""The model, the method and the machine: flags that contradict them, would change them, or would be ignored."""

from collections.abc import Iterable

from moelpr.arguments import kernels
from moelpr.arguments.settings import FIXED_FOR_MOE, RunSettings
from moelpr.process.versions import install_command
from moelpr.stages import MOE_STAGES

# Parts of the model's description that training may change.
_FREE_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")

# Of a model whose description does not mention them.
_ABSENT = {"window_size": None, "use_rope_scaling": False}

# Flags that a dense model or its stage would ignore.
_EXPERT_FLAGS = (
    "num_experts", "num_original_experts", "original_copies", "moe_router_topk", "moe_ffn_hidden_size",
    "moe_layer_freq", "balance_loss_coeff", "lpr_loss_coeff", "train_everything", "save_trained_only",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip

# Flags that stage 0 would ignore if they are not 0: it trains no routers, and decaying rows without gradient is not
# training them.
_NOT_IN_STAGE_0 = ("balance_loss_coeff", "lpr_loss_coeff", "weight_decay", "train_everything")

# Unsupported flags: the reason, and what to do instead.
_UNSUPPORTED = {
    "yaml_cfg": "its file would replace all other settings; use --recipe",
    "spec": "the trainer builds its own layers; remove it",
    "vocab_size": "it comes from the checkpoint; remove it",
    "padded_vocab_size": "it follows from the vocabulary and --tensor-model-parallel-size; remove it",
    "init_method_xavier_uniform": "weights come from the checkpoint; remove it",
    "init_model_with_meta_device": "weights are loaded before the model's memory is allocated; remove it",
    "load_main_params_from_ckpt": "main parameters start as copies of the model's; remove it",
    "moe_use_upcycling": "use checkpoint_convert/hf_to_mcore.py --num-new-experts N instead",
    "moe_enable_deepep": "it needs the flex dispatcher, see docs/design/gpu.md; remove it",
    "checkpoint_activations": "Megatron replaced it; use --recompute-activations",
    "rampup_batch_size": "Megatron ignores it; use --global-batch-size",
    "step_batch_size_schedule": "a step would be saved twice where the size changes; use --global-batch-size",
    "use_cpu_initialization": "frozen weights would stay on the CPU; remove it",
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph"), "Megatron replaced it; remove it"),
    "moe_aux_loss_coeff": "it is computed from --balance-loss-coeff; use that",
    "mock_data": "it has no language bits; use --data-path PREFIX",
    "reset_attention_mask": "attention builds its own mask; use --dataloader-inter-document-masking",
    "reset_position_ids": "rotary positions are relative; use --dataloader-inter-document-masking",
    **dict.fromkeys(
        ("multi_latent_attention", "mtp_num_layers", "hybrid_layer_pattern", "hybrid_override_pattern",
         "heterogeneous_layers_config_path"),
        "no checkpoint of this trainer has such layers; remove it",
    ),
    **dict.fromkeys(
        ("freeze_all_layers", "fim_data", "qk_l2_norm", "experimental_attention_variant", "moe_apply_probs_on_input"),
        "it would change nothing in this trainer; remove it",
    ),
    "exit_signal": "a run always saves and ends at SIGUSR1 and SIGTERM; remove it",
    "phase_transition_iterations": "a resumed run would read the text from its start; remove it",
    "sft": "Megatron would average validation otherwise than moelpr; mask text when you preprocess it, or remove it",
    "non_persistent_ckpt_type": "its steps have no checksums, and replace that of --ckpt-step; use --save-interval",
    **dict.fromkeys(
        ("use_torch_fsdp2", "use_megatron_fsdp"), "experts are saved from DDP's layout; use --use-distributed-optimizer"
    ),
    **dict.fromkeys(
        ("per_dataset_sequences_path", "dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap",
         "object_storage_cache_path", "allow_ambiguous_pad_tokens"),
        "this trainer does not read it; remove it",
    ),
}  # fmt: skip

# What no family has, and an export would compute without; another checkpoint format, which cannot be exported or
# resumed in another layout; and the modes in which Megatron repeats a step.
_FIXED = {
    "no_rope_freq": None, "window_attn_skip_freq": None, "activation_func_clamp_value": None,
    "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None, "layernorm_zero_centered_gamma": False,
    "use_mup": False, "attention_output_gate": False, "softmax_type": "vanilla", "glu_linear_offset": 0.0,
    "ckpt_format": "torch_dist", "rerun_mode": "disabled",
}  # fmt: skip

# Why some settings are fixed, and until when.
_WHY_FIXED = {
    "moe_token_dispatcher_type": "the flex dispatcher, whose DeepEP would also send rows of original experts, will be "
    "supported when tests/gpu covers it, see docs/design/gpu.md",
    "cuda_graph_impl": "the number of rows differs from step to step, see docs/design/gpu.md",
    "fp8": "new experts are not tested with it, see docs/design/gpu.md",
    "mlp_chunks_for_training": "Megatron does not pass language bits to the chunks",
    "overlap_dispatch_backward_with_experts_wgrad": "the first MoE layer's experts would get no gradient",
    "moe_mlp_glu_interleave_size": "checkpoints have the gate's rows before the up projection's",
    "qk_clip": "it would scale the weights of frozen attention",
    "te_precision_config_file": "new experts are not tested with FP8, see docs/design/gpu.md",
    "rerun_mode": "others do not check the first step for NaN, and save a step that cannot be loaded after a later one",
}


def check_checkpoint_kind(run: RunSettings) -> Iterable[str]:
    """The stage fits the checkpoint: dense, or upcycled."""
    if run.spec is None:
        return
    if run.args.stage == "dense" and run.spec.moe is not None:
        yield (
            f"--stage dense requires a dense checkpoint, but {run.checkpoint} has experts; use --stage stage1 or "
            "stage2, or convert the model with checkpoint_convert/hf_to_mcore.py --dense"
        )
    if run.args.stage in MOE_STAGES and run.spec.moe is None:
        yield (
            f"--stage {run.args.stage} requires an upcycled checkpoint, but {run.checkpoint} is dense; upcycle it with "
            "checkpoint_convert/hf_to_mcore.py --num-new-experts N"
        )


def check_model_flags(run: RunSettings) -> Iterable[str]:
    """Flags that contradict the checkpoint: one of the two would be ignored."""
    shape = (_ABSENT | run.shape) if run.shape else {}
    for name, value in shape.items():
        found = getattr(run.args, name)
        is_known = value is not None or name in _ABSENT
        if name in run.explicit_args and name not in _FREE_SHAPE and is_known and found != value:
            yield (
                f"{run.flag(name)} {found} contradicts the checkpoint {run.checkpoint}, whose model_spec.json has "
                f"{value}; remove the flag, or convert the model again"
            )


def check_unsupported_flags(run: RunSettings) -> Iterable[str]:
    """Flags of Megatron that this trainer does not support."""
    for name, flag in run.explicit_args.items():
        if name in _UNSUPPORTED and name not in run.shape:  # `check_model_flags` reports a contradiction
            yield f"{flag} is not supported: {_UNSUPPORTED[name]}"
        elif name.startswith("tokenizer_"):
            yield f"{flag} has no effect: the corpus contains token IDs; remove it"


def check_method(run: RunSettings) -> Iterable[str]:
    """Flags that the MoE-LPR layer or the stage would ignore."""
    args, explicit = run.args, run.explicit_args
    if args.stage == "dense":
        for name in _EXPERT_FLAGS:
            is_size_1 = name.endswith("parallel_size") and getattr(args, name) == 1
            if name in explicit and not is_size_1:
                yield f"{run.flag(name)} does not apply to --stage dense; remove it, or use --stage stage1"
    fixed = _FIXED | (FIXED_FOR_MOE if run.is_moe else {})
    for name, value in fixed.items():
        found = getattr(args, name)
        found = ", ".join(found) if isinstance(found, list) else found
        if name in explicit and found != value:
            why = f" ({_WHY_FIXED[name]})" if name in _WHY_FIXED else ""
            yield f"{run.flag(name)} must be {value} for this trainer, got {found}{why}; remove it"
    if run.is_moe and args.save_trained_only and args.train_everything:
        yield "--save-trained-only has no effect with --train-everything, which freezes nothing; remove one of them"


def check_new_tokens(run: RunSettings) -> Iterable[str]:
    """Rows of new tokens train where there are some, and in a stage that can train them."""
    args = run.args
    trains = "--stage stage0" if args.stage == "stage0" else "--train-new-embeddings"
    if (args.stage == "stage0" or args.train_new_embeddings) and run.spec is not None and run.spec.new_tokens is None:
        yield (
            f"{trains} requires a model with new tokens, but {run.checkpoint} has none; convert the model with "
            "checkpoint_convert/hf_to_mcore.py --extended-tokenizer DIR"
        )
    if args.train_new_embeddings and args.stage not in ("stage1", None):
        does = "trains them anyway" if args.stage in ("stage0", "dense") else "trains only routers"
        yield f"--train-new-embeddings applies to --stage stage1, and --stage {args.stage} {does}; remove it"
    if args.train_new_embeddings and args.train_everything:
        yield "--train-new-embeddings has no effect with --train-everything, which freezes nothing; remove one of them"
    for name in _NOT_IN_STAGE_0 if args.stage == "stage0" else ():
        if name in run.explicit_args and getattr(args, name):
            yield f"{run.flag(name)} does not apply to --stage stage0, which trains only rows of new tokens; remove it"


def check_deferred_gradient(run: RunSettings) -> Iterable[str]:
    """Frozen and partly trained layers cannot defer it, nor experts that are Megatron's linear layers."""
    if run.args.stage != "dense" and run.args.defer_embedding_wgrad_compute:
        yield f"--defer-embedding-wgrad-compute does not support --stage {run.args.stage}; remove it"


def check_transformer_engine(run: RunSettings) -> Iterable[str]:
    """Flags that need Transformer Engine, or PyTorch's attention in place of it."""
    args = run.args
    is_local = args.transformer_impl == "local"
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
        "--save-dgrads-interval": is_local and args.save_dgrads_interval,
        "--save-activations-interval": is_local and args.save_activations_interval,
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer
        and not kernels.is_installed("transformer_engine"),
    }
    for flag in (flag for flag, is_set in flags.items() if is_set):
        yield f"{flag} requires Transformer Engine; install it with {install_command('gpu')}, or remove the flag"


def note_stage2_without_stage1(run: RunSettings) -> Iterable[str]:
    """Not an error: it is a possible ablation."""
    if run.args.stage == "stage2" and run.record is None:
        yield (
            f"warning: --pretrained-checkpoint {run.checkpoint} has not been through stage 1, so its new experts are "
            "untrained copies; pass the --save folder of stage 1"
        )


def note_untrained_new_rows(run: RunSettings) -> Iterable[str]:
    """Not an error: stage 1 of a model whose new tokens keep the means they started as."""
    is_untrained = run.spec is not None and run.spec.new_tokens is not None and run.record is None
    if is_untrained and run.args.stage == "stage1" and not run.args.train_new_embeddings:
        yield (
            f"warning: the rows of new tokens in {run.checkpoint} are untrained means, and stay so; run stage0 first, "
            "or add --train-new-embeddings"
        )


def note_second_round(run: RunSettings) -> Iterable[str]:
    """Corpora do not record the round they were tagged for."""
    if run.is_moe and (m := run.shape["num_original_experts"]) > 1:
        yield (
            f"{run.checkpoint} has {m} original experts, so languages were added to it before: their text is now "
            "original-language text, language bit 1; preprocess corpora of an earlier round again"
        )
