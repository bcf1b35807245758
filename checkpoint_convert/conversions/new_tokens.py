"""Grows a model's vocabulary by the new tokens of an extended tokenizer, when it is converted."""

from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.hf.outputs import cast
from moelpr.data.tokenizer import load_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE, VocabularyExtension
from moelpr.process.errors import UserError


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
            f"data_tools/extend_tokenizer.py --tokenizer {model}"
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
