"""The rows of new tokens, by which embedding and output layer of a model with an extended vocabulary exceed its base's.

A new token may also have taken a row of the base that none of its tokens used.
"""

from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.common.numbers import cast
from checkpoint_convert.hf.model_files import has_tokenizer
from moelpr.base.errors import UserError
from moelpr.base.run_folder import HF_FOLDER
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE, VocabularyExtension
from moelpr.measure.evaluate.models import is_megatron


def read_extension(extended: Path, model: Path) -> VocabularyExtension:
    """Read what the extended tokenizer in one folder adds to the tokenizer of the model in another.

    Raises:
        UserError: it does not extend the model's tokenizer, or does not have the tokens that its record says.
    """
    extension = VocabularyExtension.read(extended)
    old, new = (load_tokenizer("HuggingFaceTokenizer", str(folder)) for folder in (model, extended))
    old_ids, new_ids = old.vocabulary(), new.vocabulary()
    first, end = extension.first_new_id, extension.first_new_id + extension.number
    if old.fingerprint() != extension.old_fingerprint or max(old_ids.values(), default=0) + 1 != first:
        raise UserError(
            f"{extended} extends another tokenizer than that of {model}; extend the model's own with "
            f"moelpr data extend-tokenizer --tokenizer {model}"
        )
    if any(new_ids.get(token) != id for token, id in old_ids.items()):
        raise UserError(f"the tokenizer in {extended} gives old tokens other IDs than {model} does; extend it again")
    if sorted(id for id in new_ids.values() if id >= first) != list(range(first, end)):
        raise UserError(
            f"the tokenizer in {extended} does not have the new IDs of its {VOCABULARY_EXTENSION_FILE}, {first} to "
            f"{end - 1}; extend it again"
        )
    return extension


def with_new_rows(rows_VH: Tensor, extension: VocabularyExtension, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Rows [vocab_size, hidden]: the old ones, and for each new token the mean of the rows of those that it replaces.

    Spare rows that the model had for no token become those of the first new tokens. Means are computed in fp32.
    """
    grown_VH = torch.empty(vocab_size, rows_VH.shape[1], dtype=dtype)
    grown_VH[: len(rows_VH)] = cast(rows_VH, dtype, "the embedding or the output layer")
    for id, replaced in enumerate(extension.replaces, start=extension.first_new_id):
        grown_VH[id] = rows_VH[replaced].float().mean(dim=0)
    return grown_VH


def tokenizer_folder(model: Path) -> Path:
    """The folder with the tokenizer of a Hugging Face model or a Megatron checkpoint."""
    return model / HF_FOLDER if is_megatron(model) else model


def new_rows(base: Path, model: Path) -> range:
    """The rows of the tokens that were added to the base's vocabulary, in one round or several; none: an empty range.

    Args:
        base: Hugging Face model or Megatron checkpoint; so is `model`.
    """
    ours, theirs = tokenizer_folder(model), tokenizer_folder(base)
    if not (ours / VOCABULARY_EXTENSION_FILE).is_file():
        return range(0)
    extension = VocabularyExtension.read(ours)
    first = extension.first_new_id
    if has_tokenizer(theirs):  # the file lists only the last round
        first = max(load_tokenizer("HuggingFaceTokenizer", str(theirs)).vocabulary().values()) + 1
    return range(first, max(first, extension.first_new_id + extension.number))


def without_rows(tensor: Tensor, rows: range) -> Tensor:
    """The other rows of a tensor, which may end before or in `rows`; a view if they are contiguous."""
    parts = tensor[: rows.start], tensor[rows.stop :]
    return tensor if not rows else torch.cat(parts) if len(parts[1]) else parts[0]


def shape_without(shape: tuple[int, ...], rows: range) -> tuple[int, ...]:
    """The shape of `without_rows`."""
    if not rows or not shape:
        return shape
    return (min(shape[0], rows.start) + max(shape[0] - rows.stop, 0), *shape[1:])


def grow(base: Tensor, new: Tensor, rows: range) -> Tensor:
    """The base's tensor with the rows of new tokens, which take the place of what the base has there."""
    return torch.cat([base[: rows.start], new, base[rows.stop :]])
