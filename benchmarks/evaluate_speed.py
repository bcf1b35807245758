"""Tokens per second of an evaluation against a bare forward pass of the same model on the same batches.

    python -m benchmarks.evaluate_speed [--json FILE]

The evaluation is what `python -m moelpr.evaluate` does with tokenized documents: windows, batches by length, losses,
correct predictions and, in the MoE model, routing. The baseline runs the model on the same batches, prepared in
advance, and ignores its output. Rates are medians over the rounds, in tokens of the text; the ratio is the median of
the rounds' ratios. Models are random Qwen2 and Qwen2Moe of the demo's size.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.common import add_json, argument_parser, print_table, qwen2_config, write_json
from benchmarks.timing import median_s, take_turns, time_ratio, timed_s
from moelpr.evaluate.models import LoadedModel, hf_model
from moelpr.evaluate.routing import RoutingObserver
from moelpr.evaluate.scoring import Settings, make_batches, make_tensors, score_documents

VOCABULARY = 4096
EXPERTS: dict[str, Any] = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
MEDIAN_DOCUMENT = 150  # tokens


def main() -> None:
    parser = argument_parser(__doc__, rounds=30, length=256)
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--tokens", type=int, default=2_000, help="tokens per round")
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    config = qwen2_config(layers=6, hidden=256, ffn=768, vocabulary=VOCABULARY, length=512)
    moe_config = Qwen2MoeConfig(**{**config.to_dict(), **EXPERTS, "model_type": "qwen2_moe"})
    models = {"dense": Qwen2ForCausalLM(config), "MoE, 5 experts, top 2": Qwen2MoeForCausalLM(moe_config)}
    results = {}
    for name, model in models.items():
        samples = [random_documents(args.tokens) for _ in range(args.rounds + 1)]
        results[name] = compare(model.eval(), samples, Settings(args.length, args.length // 4))
    print_table([{"tokens/s": name, **result} for name, result in results.items()])
    write_json(results, args.json)


def compare(model: Any, samples: list[list[list[int]]], settings: Settings) -> dict[str, float]:
    """Tokens of text per second of each, and their ratio; the first sample is for warm-up."""
    loaded = hf_model(Path("random"), model, tokenizer=None, start_id=0, eos_id=None)
    batches = [
        [make_tensors(batch, loaded.device)[0] for batch in make_batches(loaded, documents, settings)]
        for documents in samples
    ]
    contenders = {
        "evaluation": (partial(evaluate, loaded, documents, settings) for documents in samples),
        "forward": (partial(forward, loaded, ready) for ready in batches),
    }
    seconds, _ = take_turns(contenders, len(samples) - 1, lambda calls: timed_s(next(calls)))
    num_tokens = [sum(map(len, documents)) for documents in samples[1:]]
    per_token = {name: [s / n for s, n in zip(times, num_tokens, strict=True)] for name, times in seconds.items()}
    rates = {name: 1 / median for name, median in median_s(per_token).items()}
    return {**rates, "ratio": time_ratio(per_token, "forward", "evaluation")}


def evaluate(loaded: LoadedModel, documents: list[list[int]], settings: Settings) -> None:
    score_documents(loaded, documents, settings, RoutingObserver(loaded), tqdm(disable=True, total=0))


@torch.inference_mode()
def forward(loaded: LoadedModel, batches: list[torch.Tensor]) -> None:
    for inputs in batches:
        loaded.logits(inputs)


def random_documents(num_tokens: int) -> list[list[int]]:
    """Documents of random tokens; lengths are log-normal as in real text, some longer than a window."""
    documents: list[list[int]] = []
    while sum(map(len, documents)) < num_tokens:
        length = int(MEDIAN_DOCUMENT * torch.randn(()).mul(0.8).exp().item()) + 1
        documents.append(torch.randint(1, VOCABULARY, (length,)).tolist())
    return documents


if __name__ == "__main__":
    main()
