"""Tokens per second of an evaluation against a bare forward pass of the same model at the same batch.

    python -m benchmarks.evaluate_speed [--json FILE]

The evaluation is what `python -m moelpr.evaluate` does with tokenized documents: windows, batches by length, losses,
right guesses and, in the MoE model, routing. The peer runs the model on the same batches, which it finds ready-made, and
looks at nothing. Both take turns; tokens are those of the text, and the fastest of the rounds counts, because other work
on the machine can only slow a round down. Models are random Qwen2 and Qwen2Moe of the demo's size.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moelpr.evaluate.models import HfModel
from moelpr.evaluate.perplexity import Settings, make_batches, make_tensors, score_documents
from moelpr.evaluate.routing import RoutingObserver

SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
MEDIAN_DOCUMENT = 150  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=6_000, help="tokens per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="window in tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    models = {
        "dense": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "MoE, 5 experts, top 2": Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE, **EXPERTS)),
    }
    results = {name: compare(model.eval(), arguments) for name, model in models.items()}
    for name, result in results.items():
        print(
            f"{name}: evaluation {result['evaluation']:,.0f} tokens/s, bare forward pass {result['forward']:,.0f}, "
            f"ratio {result['ratio']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens of text per second of each, and their ratio."""
    loaded = HfModel(Path("random"), model, tokenizer=None, start_id=0, eos_id=None)
    settings = Settings(arguments.length, arguments.length // 4)
    documents = random_documents(arguments.tokens)
    num_tokens = sum(map(len, documents))
    batches = [make_tensors(batch, loaded.device)[0] for batch in make_batches(loaded, documents, settings)]
    seconds: dict[str, list[float]] = {"evaluation": [], "forward": []}
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        score_documents(loaded, documents, settings, RoutingObserver(loaded), tqdm(disable=True, total=0))
        evaluated = time.perf_counter()
        with torch.inference_mode():
            for inputs in batches:
                loaded.logits(inputs)
        seconds["evaluation"].append(evaluated - began)
        seconds["forward"].append(time.perf_counter() - evaluated)
    rates = {name: num_tokens / min(times) for name, times in seconds.items()}
    return {**rates, "ratio": rates["evaluation"] / rates["forward"]}


def random_documents(num_tokens: int) -> list[list[int]]:
    """Documents of random tokens with lengths as in real text: log-normal, some longer than a window."""
    documents: list[list[int]] = []
    while sum(map(len, documents)) < num_tokens:
        length = int(MEDIAN_DOCUMENT * torch.randn(()).mul(0.8).exp().item()) + 1
        documents.append(torch.randint(1, SHAPE["vocab_size"], (length,)).tolist())
    return documents


if __name__ == "__main__":
    main()
