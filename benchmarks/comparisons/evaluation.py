"""An evaluation against a bare forward pass of the same model on the same batches.

The evaluation is what `python -m moelpr.evaluate` does with tokenized documents: windows, batches by length, losses,
correct predictions and, in the MoE model, routing. The baseline runs the model on the same batches, prepared in
advance, and ignores its output. Models are random Qwen2 and Qwen2Moe of the demo's size.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.common import qwen2_config
from benchmarks.timing import Times, Turns
from moelpr.evaluate.models import LoadedModel, hf_model
from moelpr.evaluate.routing import RoutingObserver
from moelpr.evaluate.scoring import Settings, make_batches, make_tensors, score_documents

VOCABULARY = 4096
EXPERTS: dict[str, Any] = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True)
EXPERTS |= dict(shared_expert_intermediate_size=0, mlp_only_layers=[])
MEDIAN_DOCUMENT = 150  # tokens


DEFAULTS = {"tokens": 2000, "length": 256, "threads": 2}


def run(turns: Turns, options: Namespace) -> Iterator[tuple[str, Times]]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    config = qwen2_config(layers=6, hidden=256, ffn=768, vocabulary=VOCABULARY, length=512)
    moe_config = Qwen2MoeConfig(**{**config.to_dict(), **EXPERTS, "model_type": "qwen2_moe"})
    settings, documents = Settings(options.length, options.length // 4), random_documents(options.tokens)
    for name, model in {"dense": Qwen2ForCausalLM(config), "MoE": Qwen2MoeForCausalLM(moe_config)}.items():
        loaded = hf_model(Path("random"), model.eval(), tokenizer=None, start_id=0, eos_id=None)
        batches = [make_tensors(batch, loaded.device)[0] for batch in make_batches(loaded, documents, settings)]
        evaluation = partial(evaluate, loaded, documents, settings)
        work = {"forward": partial(forward, loaded, batches), "evaluation": evaluation}
        yield f"{name}, {sum(map(len, documents)):,} tokens", turns.take(work)


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
