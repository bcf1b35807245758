"""Make a stock Hugging Face Qwen2 directory with random weights, which the demo pre-trains as its base model.

python examples/untrained_qwen2.py --tokenizer DIR --save DIR --hidden-size 256 --num-layers 6
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import atomic_directory, refuse_existing

# Flag -> its default, and the field of Qwen2Config.
SHAPE = {
    "hidden-size": (256, "hidden_size"),
    "num-layers": (6, "num_hidden_layers"),
    "ffn-hidden-size": (768, "intermediate_size"),
    "num-attention-heads": (4, "num_attention_heads"),
    "num-query-groups": (2, "num_key_value_heads"),
}


def save_untrained_qwen2(tokenizer_path: Path, save: Path, *, seed: int = 1234, **shape: int) -> None:
    """Write a Qwen2 (qkv bias, grouped queries, RMSNorm, SwiGLU, RoPE, tied embeddings) and its tokenizer to `save`.

    `shape`: Fields of Qwen2Config.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True, trust_remote_code=False)
    config = Qwen2Config(
        **{"max_position_embeddings": 512, **shape},
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    with atomic_directory(save) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


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
    save_untrained_qwen2(args.pop("tokenizer"), args.pop("save"), **args)


if __name__ == "__main__":
    run_command(main)
