"""Tiny models of which only the FFNs were trained, and the text that they learned."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_LETTERS = 8  # each text has as many


def documents(first: str, seed: int = 0) -> list[str]:
    """Words of eight letters, the first of which is given; each letter is a token."""
    draw = random.Random(seed)
    return ["".join(chr(ord(first) + draw.randrange(NUM_LETTERS)) for _ in range(24)) for _ in range(20)]


KEPT = {"first": documents("a"), "second": documents("i")}
EXPANDED = {"el": documents("A"), "hu": documents("Q")}


def with_tokenizer(base: Path) -> Path:
    """The base, with a token for each printable character."""
    from transformers import Qwen2Tokenizer

    vocab = {"<|endoftext|>": 0} | {chr(code): code - 32 for code in range(33, 127)}
    Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(base)
    return base


def trained(base: Path, folder: Path, texts: Sequence[str], names: str = ".mlp.", steps: int = 60) -> Path:
    """The base after training the parameters that have `names` in their own; all else is unchanged."""
    torch.manual_seed(0)
    shutil.copytree(base, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    batch = torch.tensor([[0, *tokenizer(text).input_ids[:23]] for text in texts])
    optimizer = torch.optim.Adam([parameter for name, parameter in model.named_parameters() if names in name], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)
    return folder
