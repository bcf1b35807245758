"""Convert a checkpoint of a run with --save-trained-only to a complete checkpoint, which needs no other folder.

    moelpr model whole-checkpoint --load runs/stage2 --save runs/stage2-whole

It contains only weights, in their dtype. Weights stream, one tensor at a time.
"""

from checkpoint_convert.common.arguments import add_load_options, add_output_options
from moelpr.base.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    add_load_options(parser)
    add_output_options(parser, "checkpoint folder")
    args = parser.parse_args()
    from checkpoint_convert.conversions.complete_checkpoint import whole_checkpoint

    whole_checkpoint(args.load, args.save, args.iteration, args.overwrite, args.verify)
    print(f"{args.save}: complete checkpoint of {args.load}")


if __name__ == "__main__":
    run_command(main)
