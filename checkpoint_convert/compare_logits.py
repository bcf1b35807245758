"""Do a Megatron checkpoint and a Hugging Face model say the same about real text?

    python checkpoint_convert/compare_logits.py --load runs/stage2 --hf-path exported --data en.jsonl

prints the largest absolute difference of their logits, both computed in fp32, and ends with code 0 if it is within
--tolerance, else 1. Megatron's side is the trainer's own model code.
"""

import argparse
import json
import sys
from pathlib import Path

from moelpr.errors import run_command


def max_abs_logit_difference(
    load: Path, hf_path: Path, data: list[Path], num_tokens: int, sequence_length: int
) -> float:
    """Over the first `num_tokens` tokens of each file, cut into sequences of `sequence_length`."""
    from moelpr.compat import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    import torch

    from moelpr.evaluate.documents import read_documents
    from moelpr.evaluate.models import load_model as load_hf
    from moelpr.model import loading

    stock = load_hf(hf_path, dtype="float32")
    largest = 0.0
    with loading.single_process():
        model = loading.load_model(load)
        device = next(model.parameters()).device
        for file in data:
            text = "\n".join(read_documents(file, max_documents=50))
            ids = stock.tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
            length = min(sequence_length, len(ids))
            tokens = torch.tensor(ids[: len(ids) // length * length], device=device).view(-1, length)
            ours = loading.logits(model, tokens)
            with torch.inference_mode():
                theirs = stock.model(tokens.to(stock.device)).logits.to(device)
            largest = max(largest, (ours[..., : theirs.shape[-1]] - theirs).abs().max().item())
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder of the converter or the trainer")
    parser.add_argument("--hf-path", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--num-tokens", type=int, default=1024, help="tokens of each file (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference allowed (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    found = max_abs_logit_difference(args.load, args.hf_path, args.data, args.num_tokens, args.sequence_length)
    print(json.dumps({"max_abs_logit_diff": found, "tolerance": args.tolerance}))
    sys.exit(0 if found <= args.tolerance else 1)


if __name__ == "__main__":
    run_command(main)
