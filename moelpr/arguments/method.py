"""What the stage decides: the paper's defaults, and the flags of Megatron that would change the method."""

import argparse
from pathlib import Path
from typing import Any

from moelpr.model.losses import megatron_balance_coeff
from moelpr.model_spec import ModelSpec

MOE_STAGES = ("stage1", "stage2")

# Flags of Megatron that would change the method or be ignored by our layer, with the one value that is right.
# Megatron's own defaults differ in places: only what the user typed can clash (checks/method.py).
FIXED_FOR_MOE: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_expert_capacity_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    "moe_latent_size": None,
    "cuda_graph_impl": "none",
    "overlap_moe_expert_parallel_comm": False,
}


def apply_method(args: argparse.Namespace, spec: ModelSpec) -> None:
    """Set what follows from stage and model; `args` have passed the checks."""
    args.load = args.load or args.save
    if args.save and not args.tensorboard_dir:
        args.tensorboard_dir = str(Path(args.save) / "tensorboard")
    args.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, whatever the pipeline layout
    if args.data_path and args.split is None:
        args.split = "100,0,0"
    if spec.moe is None:
        args.lpr_loss_coeff = 0.0
        return
    if args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True
    for name, value in FIXED_FOR_MOE.items():
        setattr(args, name, value)
    first = args.stage == "stage1"
    if args.balance_loss_coeff is None:
        args.balance_loss_coeff = 0.01 if first else 0.0
    if args.lpr_loss_coeff is None:
        args.lpr_loss_coeff = 0.0 if first else 0.1
    args.moe_aux_loss_coeff = megatron_balance_coeff(args.balance_loss_coeff, spec.moe.topk, len(spec.moe.layers))
    args.moe_router_dtype = args.moe_router_dtype or "fp32"
