"""Add what post-training changed in a base to a model that was upcycled from this base, so that it can chat.

    moelpr model graft --base DIR --instruct DIR --model DIR --save DIR

Every tensor becomes MODEL + SCALE * (INSTRUCT - BASE), every expert with the difference of the FFN; routers are
unchanged. Tokenizer, chat template and generation settings come from the instruct model. Nothing is trained.
Weights stream, one tensor at a time.
"""

import argparse
from pathlib import Path

from checkpoint_convert.card.graft_record import PARTS
from checkpoint_convert.common.arguments import add_output_options
from checkpoint_convert.hf.hub import find_model
from moelpr.base.command import CommandParser, run_command


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    dense = "Hugging Face directory, or OWNER/NAME on the Hub"
    add("--base", type=Path, required=True, metavar="DIR", help=f"the dense base: {dense}")
    add("--instruct", type=Path, required=True, metavar="DIR", help=f"the base after its post-training: {dense}")
    upcycled = "export of the model that was upcycled from the base (moelpr model export)"
    add("--model", type=Path, required=True, metavar="DIR", help=upcycled)
    add("--scale", type=float, default=1.0, metavar="X", help="factor of the difference (default: 1)")
    only = "the attention's projections, the FFNs, or all, which includes norms, embeddings and output layer"
    add("--only", choices=PARTS, default="all", help=f"what gets the difference: {only} (default: all)")
    add_output_options(parser, "Hugging Face directory", dtype_default="that of --model")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    from checkpoint_convert.conversions.grafted_model import graft

    base, instruct, model = map(find_model, (args.base, args.instruct, args.model))
    settings = args.scale, args.only, args.dtype
    reader = graft(base, instruct, model, args.save, *settings, overwrite=args.overwrite, verify=args.verify)
    added = f"{args.scale:g} * ({args.instruct} - {args.base})"
    print(f"{args.save}: {args.model} + {added}, {args.only}, {reader.dtype}")


if __name__ == "__main__":
    run_command(main)
