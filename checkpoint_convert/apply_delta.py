"""Make the Hugging Face model that a delta (moelpr model export --delta) was made from, of its base and the delta.

    moelpr model apply-delta --base DIR --delta DIR --save DIR

The result is byte-identical to the export without --delta. Weights stream, one tensor at a time, and each must have the
checksum that the delta records.
"""

from pathlib import Path

from checkpoint_convert.common.arguments import add_output_options
from moelpr.base.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="Hugging Face directory of the base")
    parser.add_argument("--delta", type=Path, required=True, metavar="DIR", help="folder with delta_config.json")
    add_output_options(parser, "Hugging Face directory")
    args = parser.parse_args()
    from checkpoint_convert.conversions.delta import apply_delta

    config = apply_delta(args.base, args.delta, args.save, args.overwrite, args.verify)
    print(f"{args.save}: {config.config['architectures'][0]}, {config.dtype}, of {config.base_model} and {args.delta}")


if __name__ == "__main__":
    run_command(main)
