"""Write an export as a GGUF file for llama.cpp, Ollama and LM Studio, also in fewer bits.

    moelpr model gguf EXPORT --quantize Q4_K_M --ollama
    moelpr model gguf EXPORT --quantize Q4_K_M --imatrix en=en.jsonl --imatrix el=el.jsonl

llama.cpp's own converter and quantizer write it (extra `gguf`). Before, the export is checked against what llama.cpp
computes, and after, its tokenizer against the export's. With --imatrix, rounding errors count as much as the weights
matter on this text: name all languages, because what it lacks is rounded as if it did not matter.
"""

import argparse
from pathlib import Path

from checkpoint_convert.common.arguments import add_gguf_options
from checkpoint_convert.gguf import TYPES, gguf_folder
from moelpr.base.checksums import NO_VERIFY
from moelpr.base.command import CommandParser, run_command
from moelpr.measure.evaluate.arguments import named_paths


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="folder written by moelpr model export or graft")
    add("--save", type=Path, metavar="DIR", help="folder to write (default: EXPORT-gguf)")
    add_gguf_options(parser, TYPES)
    text = "text of a language, as JSON lines or Parquet, on which weights' importance is measured; repeat for all"
    add("--imatrix", action="append", default=[], metavar="LANG=FILE", help=f"{text} languages")
    known = "llama.cpp's name of the pre-tokenizer, if its converter does not know the tokenizer, e.g. qwen2"
    add("--pre-tokenizer", metavar="NAME", help=known)
    add("--overwrite", action="store_true", help="replace existing GGUF files at --save")
    add("--no-verify", **NO_VERIFY)
    args = parser.parse_args()
    if args.imatrix and not args.quantize:
        parser.error("--imatrix is for files in fewer bits; add --quantize")
    return args


def main() -> None:
    args = _parse_arguments()
    from checkpoint_convert.gguf.write import write_gguf
    from moelpr.data.text.reading import read_documents

    imatrix = {name: read_documents(path) for name, path in named_paths(args.imatrix, "--imatrix").items()}
    settings = args.quantize, args.ollama, imatrix, args.pre_tokenizer, args.overwrite, args.verify
    print(*write_gguf(args.export, args.save or gguf_folder(args.export), *settings), sep="\n")


if __name__ == "__main__":
    run_command(main)
