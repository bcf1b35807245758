"""Time of a prompt and of written tokens in stock transformers, against the dense base.

    python -m benchmarks.generation [--cpu-time] [--json FILE]

The baseline is a dense Llama of SmolLM2-135M's shape. The contenders are Mixtral models with as many experts as an
export has: a second FFN with one choice per token, or three new experts with two or three choices; all choices are of
the original expert, or spread over all.
Weights are random. A single request in bf16. Contenders take turns; ratios are medians over the rounds. Set
OMP_NUM_THREADS.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.common import add_cpu_time, argument_parser, print_table, write_json
from benchmarks.timing import Times, Turns, median_s, time_ratio

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
NEW_EXPERTS = {1: 1, 2: 3, 3: 3}  # by choices per token


def main() -> None:
    parser = argument_parser(__doc__, layers=30, hidden=576, ffn=1536, prompt=512, written=16, rounds=7)
    add_cpu_time(parser)
    args = parser.parse_args()
    rows = [
        {"case": case, "model": name, "seconds": median_s(times)[name], "ratio": time_ratio(times, name, "base")}
        for case, times in run(Turns(args.rounds, args.cpu_time), args)
        for name in times
    ]
    print_table(rows)
    write_json(rows, args.json)


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    torch.manual_seed(1)
    prompt = torch.randint(1, SHAPE["vocab_size"], (1, settings.prompt))
    models = {"base": _model(settings)}
    for topk, only_original in product(NEW_EXPERTS, (True, False)):
        name = f"K = {topk}, {'original experts' if only_original else 'all experts'}"
        models[name] = _model(settings, topk, only_original)
    for case, length, work in (
        (f"reading {settings.prompt} tokens", settings.prompt, _read),
        (f"writing {settings.written} tokens", 1, partial(_write, written=settings.written)),
    ):
        yield case, turns.take({name: partial(work, model, prompt[:, :length]) for name, model in models.items()})


def _model(settings: Namespace, topk: int = 0, only_original: bool = False) -> nn.Module:
    """A dense model, or one whose tokens take `topk` experts: the first ones if `only_original`, else any."""
    shape = SHAPE | {"num_hidden_layers": settings.layers, "hidden_size": settings.hidden}
    shape |= {"intermediate_size": settings.ffn, "max_position_embeddings": settings.prompt + settings.written}
    if not topk:
        return LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).eval()
    experts = {"num_local_experts": topk + NEW_EXPERTS[topk], "num_experts_per_tok": topk}
    model = MixtralForCausalLM(MixtralConfig(**shape, **experts)).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(partial(_choose, only_original))
    return model


def _choose(first: bool, router: nn.Module, inputs: Any, output: Any) -> Any:
    logits, weights, chosen = output
    order = -torch.arange(logits.shape[-1]).expand_as(logits) if first else torch.rand(logits.shape)
    return logits, weights, order.topk(chosen.shape[-1]).indices


@torch.inference_mode()
def _read(model: Any, prompt: torch.Tensor) -> None:
    model(prompt, logits_to_keep=1)


@torch.inference_mode()
def _write(model: Any, prompt: torch.Tensor, written: int) -> None:
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=written,
        max_new_tokens=written,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
