"""Check that a Hugging Face directory has the weights that its config.json describes, and a tokenizer that fits."""

import math
from collections import Counter
from pathlib import Path

from checkpoint_convert.hf.model_files import has_tokenizer
from checkpoint_convert.hf.safetensors_reader import HfReader, is_unread
from moelpr.base.errors import UserError
from moelpr.data.tokenizers.loading import check_text_is_kept, load_tokenizer, open_hf_tokenizer
from moelpr.model.families.families import Family
from moelpr.model.families.tables import Piece, stacked_part, zeros
from moelpr.model.model_spec import ModelSpec


def check_weights(source: HfReader, family: Family, base: ModelSpec, plan: list[Piece]) -> set[str]:
    """Check that a directory has exactly the tensors of `plan`, the pieces of the model `base`; return their names.

    Raises:
        UserError: A tensor is missing, misshapen, unknown or of another dtype.
    """
    known: set[str] = set()
    num_known: Counter[str] = Counter()  # elements of a stored tensor that are known
    for piece in plan:
        for names in piece.places:
            for name, shape in zip(names, piece.hf_shapes, strict=True):
                known.add(name)
                num_known[stacked_part(name)[0]] += math.prod(shape)
                if source.shape(name) != shape:
                    stored = list(source.shape(name))
                    raise UserError(f"{source.folder}: {name} has shape {stored}, but config.json says {list(shape)}")
                source.dtype(name)
    must_be_zero = {name for name, _ in zeros(family.table, base)}
    for name in source.names:
        if name in must_be_zero and source.read(name).any():
            raise UserError(f"{source.folder}: {name} must be zero, as a {family.name} model does not have it")
        if name not in must_be_zero and num_known[name] < math.prod(source.shape(name)) and not is_unread(source, name):
            raise UserError(
                f"{source.folder} contains the tensor {name}, which a {family.name} model with this config.json does "
                "not have, or not in this size; ignoring it would change the model"
            )
    return known


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Check that the folder's tokenizer can be read and has at most as many IDs as the embedding has rows."""
    if not has_tokenizer(folder):
        return
    tokenizer = open_hf_tokenizer(folder)
    check_text_is_kept(folder, tokenizer)
    if (num_ids := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {num_ids:,} IDs, but the model's embedding has {vocab_size:,} rows; use "
            "the tokenizer that the model was trained with, or resize the embedding"
        )


def check_same_tokenizer(base: Path, instruct: Path, model: Path, vocab_size: int, new: range) -> None:
    """Check that all three give every text the same IDs, or the model's extends the others' by the IDs `new`."""
    tokenizers = []
    for folder in (base, instruct, model):
        if not has_tokenizer(folder):
            raise UserError(f"{folder} contains no tokenizer; copy the one that the model was trained with there")
        check_tokenizer(folder, vocab_size)
        tokenizers.append(load_tokenizer("HuggingFaceTokenizer", str(folder)))
    for folder, tokenizer in zip((instruct, model), tokenizers[1:], strict=True):
        if tokenizer.fingerprint() == tokenizers[0].fingerprint():
            continue
        ours, theirs = ({id: token for token, id in t.vocabulary().items()} for t in (tokenizers[0], tokenizer))
        if folder == model and ours == {id: token for id, token in theirs.items() if id not in new}:
            continue
        different = [id for id in sorted(ours.keys() | theirs.keys()) if ours.get(id) != theirs.get(id)]
        reason = "they split text differently"
        if different:
            tokens = [by_id.get(different[0]) for by_id in (ours, theirs)]
            reason = f"the token {different[0]} is {tokens[0]!r} and {tokens[1]!r}"
        raise UserError(
            f"the tokenizers of {base} and {folder} differ: {reason}; pass models with the same tokenizer, as new text "
            "would otherwise get other tokens than in training"
        )
