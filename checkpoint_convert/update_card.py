"""Complete the model card of an export with evaluation results and metadata, so that it can be uploaded as it is.

    moelpr model card DIR --results runs/evaluation/results.json

The results become the card's model-index, and their languages the model's. `moelpr model push DIR
OWNER/NAME` uploads it.
"""

import argparse
from pathlib import Path

from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder written by moelpr model export or moelpr model graft",
    )
    results = "JSON of moelpr evaluate, of held-out text or of the harness"
    add("--results", type=Path, nargs="+", default=[], metavar="FILE", help=results)
    add("--evaluated", metavar="NAME", help="the model's name in the results (default: the one evaluated from DIR)")
    add("--base-model", metavar="OWNER/NAME", help="base on the Hugging Face Hub")
    add("--languages", type=_names, metavar="en,el,...", help="codes of languages to add")
    add("--license", metavar="ID", help="license, as the Hugging Face Hub names it, for example apache-2.0")
    add("--tags", type=_names, metavar="A,B,...", help="tags to add")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    args = _parse_arguments()
    from checkpoint_convert.card.evaluation_results import update_card
    from checkpoint_convert.hf.model_files import CARD_FILE

    changes = vars(args).keys() - {"folder", "debug"}
    if not any(getattr(args, name) for name in changes):
        raise UserError("nothing to add; pass --results, --base-model, --languages, --license or --tags")
    metadata = update_card(
        args.folder, args.results, args.evaluated, args.base_model, args.languages, args.license, args.tags
    )
    data_sets = {result.unique_identifier for result in metadata.eval_results or []}
    missing = [key for key in ("base_model", "language", "license") if not metadata.get(key)]
    note = f"; without {', '.join(missing)}" if missing else ""
    print(f"{args.folder / CARD_FILE}: results on {len(data_sets)} data sets{note}")


if __name__ == "__main__":
    run_command(main)
