"""Export a Megatron checkpoint as a Hugging Face model that stock transformers loads, without custom code.

    moelpr model export --load DIR --save DIR

A dense model is exported as its own class, an upcycled one as the stock MoE class of its family or as another that can
hold it (--as): docs/serving.md lists which programs run which class.
Weights stream from the checkpoint to safetensors, one tensor at a time. With --gguf, DIR-gguf gets the same model for
llama.cpp, Ollama and LM Studio; moelpr model gguf does that for an export that exists.
"""

import argparse
import math
import re
from pathlib import Path

from checkpoint_convert.common.arguments import add_gguf_options, add_output_options
from checkpoint_convert.gguf import TYPES, gguf_folder
from checkpoint_convert.hf.model_files import DEFAULT_SHARD_BYTES
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.model.families.moe_classes import MOE_CLASSES


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="checkpoint folder of a converter or the trainer")
    add("--iteration", type=int, metavar="STEP", help="saved step to read (default: the latest)")
    size = "largest safetensors file, e.g. 500MB or 5GB, 1 GB = 10⁹ bytes (default: 5GB)"
    base = "name of the base on the Hub, for the model card (default: the name of its folder)"
    stock = "stock MoE class to write (default: mixtral for Llama and Mistral, qwen2_moe or qwen3_moe for a Qwen)"
    add("--max-shard-size", type=_size, default=DEFAULT_SHARD_BYTES, metavar="SIZE", help=size)
    add("--base-model", metavar="NAME", help=base)
    add("--as", dest="as_class", choices=MOE_CLASSES, help=stock)
    chat = (
        "folder of the chat model whose template, special tokens and generation settings the export gets (docs/chat.md)"
    )
    add("--chat-template-from", type=Path, metavar="DIR", help=chat)
    whole = "multimodal base (Qwen3.5): the export is the whole, with its vision tower and MTP head bit for bit"
    add("--multimodal-base", type=Path, metavar="DIR", help=whole)
    add("--gguf", action="store_true", help="also write a GGUF file, to the folder DIR-gguf")
    add_gguf_options(parser, TYPES)
    add_output_options(parser, "Hugging Face directory", dtype_default="that with which --load was converted")
    return parser.parse_args()


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)", text.strip().upper())
    if match is None or not 0 < float(match[1]) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a size like 500MB or 5GB, got {text!r}")
    return max(1, int(float(match[1]) * {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]))


def main() -> None:
    args = _parse_arguments()
    if (args.quantize or args.ollama) and not args.gguf:
        raise UserError("--quantize and --ollama are about the GGUF file; add --gguf")
    from checkpoint_convert.conversions.exported_model import mcore_to_hf

    settings = args.dtype, args.max_shard_size, args.overwrite, args.base_model, args.as_class
    others = args.verify, args.chat_template_from, args.multimodal_base
    facts = mcore_to_hf(args.load, args.save, args.iteration, *settings, *others)
    moe = facts.source.spec.moe
    experts = "dense" if moe is None else f"{moe.num_experts} experts, top-{moe.topk}"
    print(f"{args.save}: {facts.architecture}, {experts}, {facts.dtype}")
    print(facts.readers)
    if args.gguf:
        from checkpoint_convert.gguf.write import write_gguf

        files = args.quantize, args.ollama
        print(*write_gguf(args.save, gguf_folder(args.save), *files, overwrite=args.overwrite), sep="\n")


if __name__ == "__main__":
    run_command(main)
