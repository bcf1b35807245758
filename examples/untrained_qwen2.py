"""Make a stock Hugging Face Qwen2 directory with random weights, which the demo pre-trains as its base model.

python examples/untrained_qwen2.py --tokenizer DIR --save DIR --hidden-size 256 --num-layers 6
"""

from pathlib import Path

from transformers import AutoTokenizer

from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import refuse_existing
from moelpr.project.toy import save_model, untrained_qwen2

# Flag -> its default, and the field of Qwen2Config.
SHAPE = {
    "hidden-size": (256, "hidden_size"),
    "num-layers": (6, "num_hidden_layers"),
    "ffn-hidden-size": (768, "intermediate_size"),
    "num-attention-heads": (4, "num_attention_heads"),
    "num-query-groups": (2, "num_key_value_heads"),
}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer directory")
    add("--save", type=Path, required=True, help="directory to write")
    for name, (default, field) in SHAPE.items():
        add(f"--{name}", dest=field, type=int, default=default, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=1234, help="seed of the random weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an existing --save")
    args = vars(parser.parse_args())
    args.pop("debug")
    refuse_existing([args["save"]], args.pop("overwrite"))
    tokenizer = AutoTokenizer.from_pretrained(args.pop("tokenizer"), local_files_only=True, trust_remote_code=False)
    save = args.pop("save")
    save_model(untrained_qwen2(tokenizer, **args), tokenizer, save)


if __name__ == "__main__":
    run_command(main)
