"""Tokens per second of an evaluation against a bare forward pass of the same model at the same batch.

    python -m benchmarks.evaluate_speed [--json FILE]

The evaluation is what `python -m moelpr.evaluate` does with tokenized documents: windows, batches by length, losses,
right guesses and, in the MoE model, routing. The peer runs the model on the same batches, which it finds ready-made,
and looks at nothing. Rounds are short and both take turns in each, so that both see the same machine. Tokens are those
of the text; rates are medians over the rounds, the ratio is the median of the rounds' ratios. Models are random Qwen2
and Qwen2Moe of the demo's size.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moelpr.evaluate.models import HfModel
from moelpr.evaluate.routing import RoutingObserver
from moelpr.evaluate.scoring import Settings, make_batches, make_tensors, score_documents

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
    parser.add_argument("--tokens", type=int, default=2_000, help="tokens per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
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
    rates: list[tuple[float, float]] = []
    for number in range(arguments.rounds + 1):
        documents = random_documents(arguments.tokens)
        batches = [make_tensors(batch, loaded.device)[0] for batch in make_batches(loaded, documents, settings)]
        ways = [partial(evaluate, loaded, documents, settings), partial(forward, loaded, batches)]
        seconds = [0.0, 0.0]
        for way in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            ways[way]()
            seconds[way] = time.perf_counter() - began
        num_tokens = sum(map(len, documents))
        rates.append((num_tokens / seconds[0], num_tokens / seconds[1]))
    rates = rates[1:]  # the first round warms up
    return {
        "evaluation": statistics.median(ours for ours, _ in rates),
        "forward": statistics.median(bare for _, bare in rates),
        "ratio": statistics.median(ours / bare for ours, bare in rates),
    }


def evaluate(loaded: HfModel, documents: list[list[int]], settings: Settings) -> None:
    score_documents(loaded, documents, settings, RoutingObserver(loaded), tqdm(disable=True, total=0))


@torch.inference_mode()
def forward(loaded: HfModel, batches: list[torch.Tensor]) -> None:
    for inputs in batches:
        loaded.logits(inputs)


def random_documents(num_tokens: int) -> list[list[int]]:
    """Documents of random tokens with lengths as in real text: log-normal, some longer than a window."""
    documents: list[list[int]] = []
    while sum(map(len, documents)) < num_tokens:
        length = int(MEDIAN_DOCUMENT * torch.randn(()).mul(0.8).exp().item()) + 1
        documents.append(torch.randint(1, SHAPE["vocab_size"], (length,)).tolist())
    return documents


if __name__ == "__main__":
    main()
