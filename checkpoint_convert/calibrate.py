"""Calibrate the routers of an export, so that text of no expanded language goes to the original expert.

    moelpr model calibrate --model runs/stage2-hf --base Qwen3-0.6B --expanded-languages el,hu \\
        --data el=el.jsonl --data hu=hu.jsonl --data en=en.jsonl --data 'other/*.jsonl' --save runs/calibrated-hf

Review shows routers a little text of the original languages; what else the base can do, they have not seen. This gives
the router's rows of the original expert's copies, in every layer, the direction that best tells all other text of
--data from that of the expanded languages. No gradient, a few thousand tokens of each text are enough. Pass text in
many languages, code and dialogues. Only routers change, and the model stays of its stock class.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from checkpoint_convert.common.arguments import add_output_options
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.base.text_tables import table_text
from moelpr.data.text.sources import named_files
from moelpr.measure.evaluate.arguments import at_least, named_paths

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
    what = "fraction of the tokens of text to keep all of whose choices should become original; fewer do if routing of "
    what += "expanded text would suffer (default: %(default)s)"
    add("--keep-original", type=float, default=0.95, metavar="FRACTION", help=what)
    what = "most KL(base‖model) on held-out text to keep, in nats per token, for which as much as possible of what "
    what += "was learned is kept (default: the smallest sum of this distance and the loss of expanded text)"
    add("--max-distance", type=float, metavar="NATS", help=what)
    add(
        "--max-tokens", type=at_least(100), default=2048, metavar="N", help="tokens of each text (default: %(default)s)"
    )
    add("--json-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    what = "cpu, cuda, cuda:N or auto: a GPU if any, and as many as the model needs (default: auto)"
    add("--device", default="auto", help=what)
    what = "of the computation; auto: float32 on a CPU, the model's own on a GPU (default: %(default)s)"
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help=what)
    add_output_options(parser, "Hugging Face directory")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    if not 0 < args.keep_original < 1:
        raise UserError(f"--keep-original must be above 0 and below 1, got {args.keep_original}")
    if args.max_distance is not None and not args.max_distance > 0:
        raise UserError(f"--max-distance must be positive, got {args.max_distance}")
    files = _named(args.data)
    languages = [canonical(name.strip()) for name in args.expanded_languages.split(",") if name.strip()]
    if missing := [name for name in languages if name not in files]:
        raise UserError(f"--expanded-languages {','.join(missing)} must be among --data ({', '.join(files)})")
    if not languages or len(languages) == len(files):
        what = "text to keep" if languages else "an expanded language"
        raise UserError(f"--data has no text of {what}; pass text of both kinds, and name the expanded languages")
    from checkpoint_convert.conversions.calibrated_routers import write_calibrated
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
        args.keep_original,
        args.max_tokens,
        args.max_distance,
        device=args.device,
        dtype=args.dtype,
        overwrite=args.overwrite,
        verify=args.verify,
    )
    rows = [
        [
            text,
            *(f"{shares.all_original:.1%}" for shares in pair),
            *(f"{shares.new_gate_weight:.1%}" for shares in pair),
        ]
        for text, pair in ((text, (record.before[text], record.after[text])) for text in record.before)
    ]
    head = ["held-out text", "all original, before", "after", "weight of new experts, before", "after"]
    print(table_text(head, rows, [0]))
    after = (record.distance[1], record.loss[1])
    rows = [["trained routers", f"{record.distance[0]:.3f}", f"{record.loss[0]:.3f}"]]
    rows += [
        ["calibrated, chosen" if pair == after else "calibrated", *(f"{number:.3f}" for number in pair)]
        for pair in record.tried
    ]
    print(table_text(["nats per held-out token", "text to keep, KL(base‖model)", "expanded text, loss"], rows, [0]))
    print(f"{args.save}: {args.model} with calibrated routers")
    if args.max_distance is None and after[0] > FAR_FROM_BASE:
        print(
            f"warning: calibrated routers are still {after[0]:.2f} nats per token from the base on text to keep, more "
            f"than {FAR_FROM_BASE:g}: one direction does not tell these texts apart; review may keep more (in "
            "languages.yaml, remove replay: none)",
            file=sys.stderr,
        )


def _named(items: list[str]) -> dict[str, str]:
    """The files of --data by name; without a name, each file is a text, named like it."""
    pairs = (
        [item] if "=" in item else [f"{name}={path}" for name, path in named_files([item], "--data").items()]
        for item in items
    )
    return named_paths([*chain.from_iterable(pairs)], "--data")


if __name__ == "__main__":
    run_command(main)
