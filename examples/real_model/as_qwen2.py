"""Write a Llama as the Qwen2 that computes the same, so that some of its layers can stay dense.

python -m examples.real_model.as_qwen2 --hf-path DIR --save DIR

Qwen2 is Llama with biases on queries, keys and values; here they are zero. The stock MoE class of Llama, Mixtral, has
experts in every layer, that of Qwen2 in any layers.
"""

import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoint_convert.hf_folder import TOKENIZER_FILES
from moelpr.errors import CommandParser, UserError, run_command
from moelpr.evaluate.models import load_model
from moelpr.families.families import LLAMA, read_base
from moelpr.files import atomic_directory, refuse_existing

# Of the logits of two transformers classes: they may sum in another order.
MAX_DIFFERENCE = 1e-4


def save_as_qwen2(hf_path: Path, save: Path) -> float:
    """Write the Llama in `hf_path` to `save` as a Qwen2, and return the largest difference of a logit.

    Raises:
        UserError: the model is not a Llama, or Qwen2 computes something else.
    """
    family, base = read_base(hf_path)
    if family != LLAMA:
        raise UserError(f"{hf_path} must be a LlamaForCausalLM, got a {family.name}; a Qwen model needs no rewriting")
    loaded = load_model(hf_path, "cpu", "float32")
    llama = loaded.model
    shape = {
        name: getattr(llama.config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
        )
    }  # fmt: skip
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**shape, dtype="float32")).eval()
    biases = {name: torch.zeros_like(bias) for name, bias in qwen2.state_dict().items() if name.endswith("_proj.bias")}
    qwen2.load_state_dict(llama.state_dict() | biases)
    qwen2.generation_config = llama.generation_config
    tokens = torch.arange(128).reshape(2, 64) * 389 % base.megatron_args["vocab_size"]
    with torch.inference_mode():
        difference = (llama(tokens).logits - qwen2(tokens).logits).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise UserError(f"{hf_path} as a Qwen2 has other logits, by {difference:.1e}; choose layers of a Qwen model")
    with atomic_directory(save) as temporary:
        qwen2.save_pretrained(temporary)
        for name in TOKENIZER_FILES:
            if (hf_path / name).is_file():
                shutil.copy(hf_path / name, temporary)
    return difference


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-path", type=Path, required=True, metavar="DIR", help="Llama as a Hugging Face directory")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --save")
    args = parser.parse_args()
    refuse_existing([args.save], args.overwrite)
    print(f"{args.save}: largest difference of a logit {save_as_qwen2(args.hf_path, args.save):.1e}")


if __name__ == "__main__":
    run_command(main)
