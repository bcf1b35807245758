"""Find the routers of an export again, so that text of no expanded language goes to the original expert.

    moelpr model calibrate --model runs/stage2-hf --base Qwen3-0.6B --expanded-languages el,hu \\
        --data el=el.jsonl --data hu=hu.jsonl --data en=en.jsonl --data 'other/*.jsonl' --save runs/calibrated-hf

Review shows routers a little text of the original languages; what else the base can do, they have not seen. This gives
the router's rows of the original expert's copies, in every layer, the direction that best tells all other text of
--data from that of the expanded languages. No gradient, a few thousand tokens of each text are enough. Pass text in
many languages, code and dialogues. Only routers change, and the model stays of its stock class.
"""

import argparse
import sys
from pathlib import Path

from checkpoint_convert.common.arguments import (
    add_output_options,
    add_routing_options,
    check_routing_options,
    named_texts,
)
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical

FAR_FROM_BASE = 0.2  # nats per token; it was at most 0.07 on models that calibration served well, and 0.5 on another


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    what = "export of an upcycled model with as many copies of the original expert as choices (moelpr model export)"
    add("--model", type=Path, required=True, metavar="DIR", help=what)
    add("--base", type=Path, required=True, metavar="DIR", help="the dense base that it was upcycled from")
    what = "text: JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet, a file, folder or pattern, of which the first "
    what += "--max-tokens are read; without NAME=, each file is a text, named like it; repeat for several texts, which "
    what += "count the same"
    add("--data", action="append", required=True, metavar="[NAME=]FILE", help=what)
    what = "languages of --data that were added; all other --data is text to keep"
    add("--expanded-languages", required=True, metavar="el,hu,...", help=what)
    add_routing_options(parser)
    add_output_options(parser, "Hugging Face directory")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    check_routing_options(args)
    files = named_texts(args.data, "--data")
    languages = [canonical(name.strip()) for name in args.expanded_languages.split(",") if name.strip()]
    if missing := [name for name in languages if name not in files]:
        raise UserError(f"--expanded-languages {','.join(missing)} must be among --data ({', '.join(files)})")
    if not languages or len(languages) == len(files):
        what = "text to keep" if languages else "an expanded language"
        raise UserError(f"--data has no text of {what}; pass text of both kinds, and name the expanded languages")
    from checkpoint_convert.conversions.calibrated_model import write_calibrated
    from moelpr.data.text.reading import read_documents
    from moelpr.measure.evaluate.models import check_device

    check_device(args.device)
    texts = {name: read_documents(path, args.json_key, args.max_tokens) for name, path in files.items()}
    record = write_calibrated(
        args.model,
        args.base,
        args.save,
        {name: documents for name, documents in texts.items() if name not in languages},
        {name: texts[name] for name in languages},
        args.max_tokens,
        args.max_distance,
        args.keep,
        device=args.device,
        dtype=args.dtype,
        overwrite=args.overwrite,
        verify=args.verify,
    )
    print(record.table())
    print(f"{args.save}: {args.model} with calibrated routers")
    if args.max_distance is None and (distance := record.result.distance) > FAR_FROM_BASE:
        print(
            f"warning: calibrated routers are still {distance:.2f} nats per token from the base on text to keep, more "
            f"than {FAR_FROM_BASE:g}: one direction does not tell these texts apart; review may keep more (in "
            "languages.yaml, remove replay: none)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)
