"""The checkpoint a run starts from: is it the right kind, and do the flags agree with it?"""

from collections.abc import Iterable
from pathlib import Path

from moelpr.arguments.checks.run import Run
from moelpr.arguments.method import MOE_STAGES
from moelpr.checkpoints import step_folder
from moelpr.errors import UserError
from moelpr.run_folder import TRACKER_FILE

# Parts of the model's description that training may change.
_FREE_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")

# What the layers of this trainer are, whatever the family.
_LAYERS = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"}


def the_kind_fits_the_stage(run: Run) -> Iterable[str]:
    if run.spec is None:
        return
    if run.args.stage == "dense" and run.spec.moe is not None:
        yield (
            f"--stage dense was given the MoE checkpoint {run.checkpoint}; use --stage stage1 or stage2, "
            "or convert the model with checkpoint_convert/hf_to_mcore.py --dense"
        )
    if run.args.stage in MOE_STAGES and run.spec.moe is None:
        yield (
            f"--stage {run.args.stage} needs an upcycled checkpoint, but {run.checkpoint} is dense; "
            "upcycle it with checkpoint_convert/hf_to_mcore.py --num-new-experts N"
        )


def flags_agree_with_the_model(run: Run) -> Iterable[str]:
    """A recipe or command line may not contradict the checkpoint: one of the two would be ignored."""
    for name, value in run.shape.items():
        found = getattr(run.args, name)
        if name in run.typed and name not in _FREE_SHAPE and value is not None and found != value:
            yield (
                f"{run.typed[name]} {found} contradicts the checkpoint {run.checkpoint}, whose model_spec.json says "
                f"{value}; drop the flag, or convert the model again"
            )


def experts_need_an_upcycled_model(run: Run) -> Iterable[str]:
    if run.spec is None or run.spec.moe is not None:
        return
    for name in ("num_experts", "num_original_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq"):
        if name in run.typed:
            yield (
                f"{run.typed[name]} has no meaning for the dense checkpoint {run.checkpoint}; drop it, or upcycle the "
                "model with checkpoint_convert/hf_to_mcore.py --num-new-experts N"
            )


def the_layers_can_be_built(run: Run) -> Iterable[str]:
    for name, wanted in _LAYERS.items():
        if run.shape and run.shape[name] != wanted:
            yield (
                f"{run.checkpoint} is a model with {name} {run.shape[name]}; this trainer builds layers with {wanted} "
                "only, start from another model"
            )


def the_weights_are_there(run: Run) -> Iterable[str]:
    if run.checkpoint is None:
        return
    try:
        step_folder(run.checkpoint, run.step)
    except UserError as error:
        yield str(error)


def the_folder_to_load_holds_something(run: Run) -> Iterable[str]:
    """Megatron would go on with --pretrained-checkpoint and say nothing."""
    load, save = run.args.load, run.args.save
    if load and load != save and run.checkpoint not in (None, Path(load)):
        yield (
            f"--load {load} holds no checkpoint ({TRACKER_FILE} is missing), so the run would start from "
            f"{run.checkpoint}; name a folder that holds one, or drop --load"
        )


def stage2_without_stage1(run: Run) -> Iterable[str]:
    """Not refused: it is an ablation someone may want."""
    if run.args.stage == "stage2" and run.record is None:
        yield (
            f"stage 2 starts from {run.checkpoint}, which no run has trained: its new experts are as upcycling made "
            "them, and stage 2 trains routers only"
        )


def a_further_round_has_more_original_languages(run: Run) -> Iterable[str]:
    """Nothing shows whether a corpus was tagged for this round or for the one before."""
    if run.is_moe and (m := run.shape["num_original_experts"]) > 1:
        yield (
            f"{run.checkpoint} has {m} original experts, so it has learnt languages before: their text is "
            "original-language text now, language bit 1; corpora of an earlier round must be preprocessed again"
        )


CHECKS = (
    the_kind_fits_the_stage,
    flags_agree_with_the_model,
    experts_need_an_upcycled_model,
    the_layers_can_be_built,
    the_weights_are_there,
    the_folder_to_load_holds_something,
)
