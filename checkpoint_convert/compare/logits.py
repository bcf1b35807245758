"""Compare two models by their fp32 logits on real text.

transformers runs a Hugging Face model and the trainer's model code a Megatron checkpoint; one model is in memory at a
time, and the logits of the first are stored in a temporary file.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_convert.hf.model_files import has_tokenizer
from checkpoint_convert.hf.vocabulary_rows import new_rows, tokenizer_folder
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError, reports_panics
from moelpr.data.text.reading import read_documents
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.measure.evaluate.models import is_megatron, open_model
from moelpr.model.families.hf_config import read_config
from moelpr.model.model_spec import ModelSpec


@dataclass(frozen=True)
class TextVerdict:
    """The comparison of two models' logits on one file."""

    file: Path
    num_tokens: int
    max_abs_logit_diff: float  # largest absolute difference over all tokens and the vocabulary; inf if one is NaN
    num_same_choice: int  # number of tokens after which both models predict the same next token


def compare_on_text(
    a: Path,
    b: Path,
    files: list[Path],
    num_tokens: int = 1024,
    sequence_length: int = 128,
    verify: Verify = Verify.FULL,
) -> list[TextVerdict]:
    """Compare both models' logits on text; of two vocabularies, one an extension of the other, those of the old tokens.

    Args:
        a: Hugging Face model or Megatron checkpoint; so is `b`.
        files: JSON lines or Parquet with "text".
        num_tokens: Tokens of each file, from its start.
        sequence_length: Length of a sequence in tokens; a model with a shorter context shortens it.

    Raises:
        UserError: a file has no text, the vocabularies of the models differ in another way, or their tokenizers give
            the text different tokens.
    """
    shape_a, shape_b = _shape(a), _shape(b)
    added = new_rows(a, b) or new_rows(b, a)
    vocab_size = added.start if added else shape_a["vocab_size"]
    if not added and vocab_size != shape_b["vocab_size"]:
        raise UserError(
            f"--text requires two models with the same vocabulary, got {vocab_size} tokens in {a} and "
            f"{shape_b['vocab_size']} in {b}; remove --text"
        )
    length = min(sequence_length, shape_a["max_position_embeddings"], shape_b["max_position_embeddings"])
    sequences = [
        (file, sequence)
        for file, ids in zip(files, _token_ids(a, b, files, num_tokens, bool(added)), strict=True)
        for sequence in torch.tensor(ids).split(length)
    ]
    tokens = [sequence for _, sequence in sequences]
    largest, same, counts = dict.fromkeys(files, 0.0), dict.fromkeys(files, 0), dict.fromkeys(files, 0)
    with tempfile.TemporaryFile() as stored:
        for logits in _logits(a, tokens, vocab_size, verify):
            stored.write(memoryview(logits.numpy()).cast("B"))
        stored.seek(0)
        for (file, sequence), logits_b in zip(sequences, _logits(b, tokens, vocab_size, verify), strict=True):
            logits_a = torch.empty(len(sequence), vocab_size)
            stored.readinto(memoryview(logits_a.numpy()).cast("B"))
            counts[file] += len(sequence)
            same[file] += int((logits_a.argmax(dim=-1) == logits_b.argmax(dim=-1)).sum())
            difference = logits_a.sub_(logits_b).abs_().max().item()
            largest[file] = max(largest[file], math.inf if math.isnan(difference) else difference)
    return [TextVerdict(file, counts[file], largest[file], same[file]) for file in files]


def _shape(model: Path) -> dict[str, Any]:
    if is_megatron(model):
        return ModelSpec.read(model).megatron_args
    config = read_config(model)
    for name in ("vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(name), int):
            raise UserError(f"{model}/config.json is not that of a language model: it has no {name}")
    return config


@reports_panics()
def _token_ids(a: Path, b: Path, files: list[Path], num_tokens: int, is_extended: bool) -> list[list[int]]:
    """The first `num_tokens` of each file with the models' tokenizers, which must agree."""
    # A document has at least one token.
    texts = ["\n".join(read_documents(file, max_documents=num_tokens)) for file in files]
    ids = []
    for model in (a, b):
        folder = tokenizer_folder(model)
        if not has_tokenizer(folder):
            raise UserError(f"--text requires a tokenizer, but {folder} contains none; copy the base's tokenizer there")
        tokenizer = open_hf_tokenizer(folder)
        ids.append([tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens] for text in texts])
    if ids[0] != ids[1]:
        fix = "pass text of the original languages, which has no new tokens, or remove --text"
        raise UserError(
            f"--text requires text that both tokenizers tokenize alike, but those of {a} and {b} tokenize this text "
            f"differently; {fix if is_extended else 'remove --text'}"
        )
    return ids[0]


def _logits(model: Path, sequences: list[Tensor], vocab_size: int, verify: Verify) -> Iterator[Tensor]:
    """fp32 logits [tokens, vocabulary] of each sequence; the model is in memory until the last one is yielded."""
    with open_model(model, dtype="float32", verify=verify) as loaded:
        for sequence in sequences:
            with torch.inference_mode():
                logits = loaded.logits(sequence[None].to(loaded.device))
            yield logits[0, :, :vocab_size].float().cpu().contiguous()
