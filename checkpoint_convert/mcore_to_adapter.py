"""Export a Megatron checkpoint as an adapter that the published MoE-LPR code loads.

    moelpr model export-adapter --load DIR --save DIR --base-model NAME

The adapter contains routers and new experts; everything else must be the base's. Weights stream, one tensor at a time.
"""

from checkpoint_convert.common.arguments import add_load_options, add_output_options
from moelpr.base.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    add_load_options(parser)
    base = "name or path of the dense model, for PEFT to load"
    parser.add_argument("--base-model", required=True, metavar="NAME", help=base)
    add_output_options(parser, "adapter folder", dtype_default="that with which --load was converted")
    args = parser.parse_args()
    from checkpoint_convert.conversions.published_adapter import mcore_to_adapter

    settings = args.iteration, args.dtype, args.overwrite, args.verify
    config = mcore_to_adapter(args.load, args.save, args.base_model, *settings)
    print(
        f"{args.save}: adapter of {config.base_model_name_or_path}, {config.num_experts} experts, top-{config.topk}, "
        f"in {len(config.layers_to_transform)} layers"
    )


if __name__ == "__main__":
    run_command(main)
