"""Convert a Hugging Face model to a Megatron checkpoint and upcycle its FFNs to experts.

    moelpr model convert --hf-path DIR --save DIR --num-new-experts 4 --topk 2

Experts 0 to K - 1 are the dense FFN, and N new experts start equal to it, so the model still computes what the dense
model did; tokens that choose only the first K keep the dense output. --original-copies 1 is the paper's single one.
With --extended-tokenizer DIR the vocabulary grows; logits of old tokens stay as they are on text without new ones.
Routers are initialized xavier-normal. A stock MoE, such as an earlier export, keeps its experts and gets N more.
Weights stream from safetensors to the checkpoint, one tensor at a time.
"""

import argparse
from pathlib import Path

from checkpoint_convert.common.arguments import add_output_options
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.plan.arguments import add_expert_flags, new_experts


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    model = "model: config.json, safetensors and tokenizer; or OWNER/NAME on the Hugging Face Hub, which is downloaded"
    add("--hf-path", type=Path, required=True, metavar="DIR", help=model)
    add("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main; its commit is recorded)")
    experts = parser.add_mutually_exclusive_group(required=True)
    experts.add_argument("--num-new-experts", type=int, metavar="N", help="number of experts to add to each MoE layer")
    experts.add_argument("--dense", action="store_true", help="add no experts: write a dense checkpoint")
    extended = (
        "a tokenizer that moelpr data extend-tokenizer made from the model's: each new token gets a row of the "
        "embedding and the output layer, the mean of those of the tokens that it replaces (default: the model's own)"
    )
    add("--extended-tokenizer", type=Path, metavar="DIR", help=extended)
    add_expert_flags(parser)
    add = parser.add_argument_group("initialization of new experts").add_argument
    start = "copies of the FFN (in an MoE: of expert 0), or random, an ablation (default: %(default)s)"
    noise = "add noise to each copy, as a fraction of the standard deviation of its weights (default: 0)"
    dropped = "reinitialize this fraction of each copy's FFN dimensions, 0 to 1: Drop-Upcycling (default: 0)"
    add("--new-experts", choices=("copied", "random"), default="copied", help=start)
    add("--expert-noise", type=float, default=0.0, metavar="FRACTION", help=noise)
    add("--reinitialise", "--reinitialize", type=float, default=0.0, metavar="FRACTION", help=dropped)
    add("--seed", type=int, default=1234, metavar="N", help="random seed (default: %(default)s)")
    add_output_options(parser, "checkpoint folder", dtype_default="that of the model's tensors")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    from checkpoint_convert.conversions.initialization import Start
    from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
    from checkpoint_convert.hf.hub import find_model
    from moelpr.model.families.families import read_base

    start = Start(args.new_experts, args.expert_noise, args.reinitialise, args.seed)
    layers = args.moe_layers, args.moe_every_k_layers
    if args.dense and (layers != (None, None) or args.topk or args.original_copies or start != Start(seed=args.seed)):
        raise UserError(
            "--dense adds no experts; remove --topk, --original-copies and the options for layers and new experts"
        )
    model = find_model(args.hf_path, args.revision)
    experts = None if args.dense else new_experts(args, read_base(model.folder)[1])
    settings = args.dtype, args.overwrite, model, args.extended_tokenizer, args.verify
    spec = hf_to_mcore(model.folder, args.save, experts, start, *settings)
    layout = "dense"
    if (moe := spec.moe) is not None:
        copies = f" with {moe.original_copies} copies of the dense FFN" if moe.original_copies > 1 else ""
        layout = (
            f"{moe.num_experts} experts ({moe.num_original_places} original{copies} + {moe.num_new_experts} new), "
            f"top-{moe.topk}, in {len(moe.layers)} of {spec.megatron_args['num_layers']} layers"
        )
    if spec.new_tokens is not None:
        layout += f", {spec.new_tokens.number} new tokens"
    print(f"{args.save}: {spec.family}, {spec.dtype}, {layout}")


if __name__ == "__main__":
    run_command(main)
