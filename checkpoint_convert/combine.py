"""Combine a dense base and models of which only the FFNs were trained to one stock MoE, without training.

    moelpr model combine Qwen3-0.6B --expert el,hu=runs/el-hu --expert tr=runs/tr \\
        --text el=el.jsonl --text hu=hu.jsonl --text tr=tr.jsonl --keep-text en=en.jsonl 'other/*.jsonl' --save combined

A token uses one FFN per layer: the base's, or that of an expert, at the speed of the base. Routers are found in closed
form, of a few thousand tokens of each text (docs/combine.md). Where they choose the base's FFN, the model is the base.
"""

import argparse
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


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help="Hugging Face directory of the dense base")
    what = "languages, and the folder of a model that was trained from the base in its FFNs only: a Hugging Face "
    what += "directory, a LoRA adapter of peft, or a checkpoint of the trainer; repeat for several"
    add("--expert", action="append", required=True, metavar="LANGUAGES=DIR", help=what)
    what = "text of each language of --expert: JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet, a file, folder or "
    what += "pattern, of which the first --max-tokens are read"
    add("--text", nargs="+", action="extend", required=True, metavar="LANGUAGE=FILE", help=what)
    what = "text that should stay as the base has it, in many languages and kinds; each file is a text, named like it"
    add("--keep-text", nargs="+", action="extend", required=True, metavar="[NAME=]FILE", help=what)
    what = "leave out what an expert changed beside its FFNs, and measure what that costs"
    add("--ignore-others", action="store_true", help=what)
    add_routing_options(parser)
    add_output_options(parser, "Hugging Face directory")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    check_routing_options(args)
    experts: dict[Path, list[str]] = {}
    for item in args.expert:
        names, _, folder = item.partition("=")
        languages = [canonical(name.strip()) for name in names.split(",") if name.strip()]
        if not languages or not folder or Path(folder) in experts:
            raise UserError(f"--expert must be LANGUAGES=DIR, each folder once, got {item!r}")
        experts[Path(folder)] = languages
    listed = [language for languages in experts.values() for language in languages]
    texts, kept = named_texts(args.text, "--text"), named_texts(args.keep_text, "--keep-text")
    if sorted(listed) != sorted(texts):
        raise UserError(f"--text must have the languages of --expert ({', '.join(listed)}), got {', '.join(texts)}")
    if both := texts.keys() & kept.keys():
        raise UserError(f"--keep-text {min(both)} is in an expanded language; remove it, or give it another name")
    from checkpoint_convert.conversions.combined_model import combine
    from moelpr.data.text.reading import read_documents
    from moelpr.measure.evaluate.models import check_device

    check_device(args.device)
    kept_texts, expanded = (
        {name: read_documents(path, args.json_key, args.max_tokens) for name, path in files.items()}
        for files in (kept, texts)
    )
    record = combine(
        args.base,
        experts,
        args.save,
        kept_texts,
        expanded,
        args.max_tokens,
        args.max_distance,
        args.keep,
        args.ignore_others,
        device=args.device,
        dtype=args.dtype,
        overwrite=args.overwrite,
        verify=args.verify,
    )
    print(record.table())
    print(f"{args.save}: {args.base} and the FFNs of {', '.join(map(str, experts))}")


if __name__ == "__main__":
    run_command(main)
