"""Do two models say the same about real text? Each is run by the reader its users run it with, in fp32.

A Hugging Face folder is read by transformers, a Megatron checkpoint by the trainer's own model code. One model is in
memory at a time; the first one's logits wait in a temporary file.
"""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_convert.hf_folder import TOKENIZER_FILES
from moelpr.errors import UserError
from moelpr.families.hf_config import read_config
from moelpr.model_spec import FILE_NAME, ModelSpec
from moelpr.run_folder import HF_FOLDER

# Tokens are shorter, so of plain text no more is read than this.
CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class TextVerdict:
    """How far two models' logits are apart on one file.

    max_abs_logit_diff: largest absolute difference over all tokens and the whole vocabulary; inf where one is NaN.
    num_same_choice: tokens after which both hold the same next token for the likeliest.
    """

    file: Path
    num_tokens: int
    max_abs_logit_diff: float
    num_same_choice: int


def compare_on_text(
    a: Path, b: Path, files: list[Path], num_tokens: int = 1024, sequence_length: int = 128
) -> list[TextVerdict]:
    """Both models' logits on the first `num_tokens` tokens of each file, in sequences of at most `sequence_length`.

    files: JSON lines with "text" (.jsonl, .json), or plain text. Sequences are shorter where a model's context is.
    Raises UserError for a file without text, and for models of different vocabularies or tokenizers.
    """
    shape_a, shape_b = _shape(a), _shape(b)
    vocab_size = shape_a["vocab_size"]
    if vocab_size != shape_b["vocab_size"]:
        raise UserError(
            f"{a} has a vocabulary of {vocab_size} and {b} one of {shape_b['vocab_size']}, so their logits can't be "
            "compared; leave --text out or give two models with the same vocabulary"
        )
    length = min(sequence_length, shape_a["max_position_embeddings"], shape_b["max_position_embeddings"])
    sequences = [
        (file, sequence)
        for file, ids in zip(files, _token_ids(a, b, files, num_tokens), strict=True)
        for sequence in torch.tensor(ids).split(length)
    ]
    tokens = [sequence for _, sequence in sequences]
    largest, same = dict.fromkeys(files, 0.0), dict.fromkeys(files, 0)
    with tempfile.TemporaryFile() as waiting:
        for logits in _logits(a, tokens, vocab_size):
            waiting.write(memoryview(logits.numpy()).cast("B"))
        waiting.seek(0)
        for (file, sequence), theirs in zip(sequences, _logits(b, tokens, vocab_size), strict=True):
            ours = torch.empty(len(sequence), vocab_size)
            waiting.readinto(memoryview(ours.numpy()).cast("B"))
            same[file] += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
            difference = ours.sub_(theirs).abs_().max().item()
            largest[file] = max(largest[file], float("inf") if difference != difference else difference)
    counts = {file: sum(len(sequence) for other, sequence in sequences if other == file) for file in files}
    return [TextVerdict(file, counts[file], largest[file], same[file]) for file in files]


def _shape(model: Path) -> dict[str, Any]:
    if (model / FILE_NAME).is_file():
        return ModelSpec.read(model).megatron_args
    config = read_config(model)
    for name in ("vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(name), int):
            raise UserError(f"{model}/config.json has no {name}, so it is no language model that can be compared")
    return config


def _token_ids(a: Path, b: Path, files: list[Path], num_tokens: int) -> list[list[int]]:
    """The first `num_tokens` of each file, by the models' own tokenizer; where both have one, they must agree."""
    texts = [_read_text(file, num_tokens) for file in files]
    folders = [model / HF_FOLDER if (model / FILE_NAME).is_file() else model for model in (a, b)]
    folders = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    if not folders:
        raise UserError(f"neither {a} nor {b} holds a tokenizer, so --text has no use; copy the base model's into one")
    readings = [_tokenize(folder, texts, num_tokens) for folder in folders]
    if readings[0] != readings[-1]:
        raise UserError(
            f"the tokenizers in {folders[0]} and {folders[-1]} read the text differently, so the logits can't be "
            "compared; leave --text out or give two models with the same tokenizer"
        )
    return readings[0]


def _tokenize(folder: Path, texts: list[str], num_tokens: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens] for text in texts]


def _read_text(file: Path, num_tokens: int) -> str:
    from moelpr.documents import read_documents

    if file.suffix in (".jsonl", ".json"):
        return "\n".join(read_documents(file, max_documents=num_tokens))  # a document is a token at least
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(CHARACTERS_PER_TOKEN * num_tokens)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{file} can't be read: {reason}; give --text files of JSON lines or plain text") from error
    if not text.strip():
        raise UserError(f"{file} holds no text; give --text files of JSON lines or plain text")
    return text


def _logits(model: Path, sequences: list[Tensor], vocab_size: int) -> Iterator[Tensor]:
    """fp32 logits [tokens, vocabulary] of each sequence. The model is in memory until the last one is taken."""
    reader = _megatron_logits if (model / FILE_NAME).is_file() else _hf_logits
    for logits in reader(model, sequences):
        yield logits[0, :, :vocab_size].float().cpu().contiguous()
    gc.collect()


def _megatron_logits(folder: Path, sequences: list[Tensor]) -> Iterator[Tensor]:
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    from moelpr.model import loading

    with loading.single_process():
        model = loading.load_model(folder)
        device = next(model.parameters()).device
        for sequence in sequences:
            yield loading.logits(model, sequence[None].to(device))


def _hf_logits(folder: Path, sequences: list[Tensor]) -> Iterator[Tensor]:
    from moelpr.evaluate.models import load_model

    loaded = load_model(folder, dtype="float32")
    for sequence in sequences:
        with torch.inference_mode():
            logits = loaded.model(sequence[None].to(loaded.device)).logits
        yield logits
