"""Checks of the tokenizers of models."""

from pathlib import Path

from checkpoint_convert.hf.model_files import TOKENIZER_FILES
from moelpr.data.tokenizers.loading import check_text_is_kept, load_tokenizer, open_hf_tokenizer
from moelpr.process.errors import UserError


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Check that the folder's tokenizer can be read and has at most as many IDs as the embedding has rows."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer = open_hf_tokenizer(folder)
    check_text_is_kept(folder, tokenizer)
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_ids > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {num_ids:,} IDs, but the model's embedding has {vocab_size:,} rows; use "
            "the tokenizer that the model was trained with, or resize the embedding"
        )


def check_same_tokenizer(base: Path, instruct: Path, model: Path, vocab_size: int, new: range) -> None:
    """Check that all three give every text the same IDs, or the model's extends the others' by the IDs `new`."""
    tokenizers = []
    for folder in (base, instruct, model):
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
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
