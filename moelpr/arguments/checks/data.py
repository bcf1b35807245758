"""Corpora: are they there, does the model know their tokens, and how are their documents read?"""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

from moelpr.arguments.checks.run import Run
from moelpr.data.manifest import Manifest, TokenizerMatch, TokenizerRecord, compare_tokenizers, manifest_path
from moelpr.errors import UserError
from moelpr.run_folder import HF_FOLDER

_DATA = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")

# Flags for data that Megatron's own entry scripts read and this trainer does not.
_UNREAD = (
    "per_dataset_sequences_path",
    "dataloader_fast_cache_load",
    "dataloader_defer_npy_index_mmap",
    "object_storage_cache_path",
    "allow_ambiguous_pad_tokens",
)
_APART = "--dataloader-inter-document-masking"


def data_is_named_once(run: Run) -> Iterable[str]:
    if "mock_data" in run.typed:
        yield "--mock-data has no language bits; name corpora with --data-path PREFIX"
        return
    given = [run.typed[name] for name in _DATA if name in run.typed]
    if len(given) > 1:
        yield f"{' and '.join(given)} both name the training data; keep one of them"
    elif not given and run.recipe_is_read:
        yield "no training data; name corpora with --data-path PREFIX (built by data_tools/preprocess_data.py)"


def data_is_there(run: Run) -> Iterable[str]:
    try:
        blends = _blends(run)
    except (AssertionError, OSError, ValueError, KeyError, TypeError) as error:
        yield f"the training data can't be read from the flags ({error}); give --data-path [WEIGHT] PREFIX …"
        return
    for prefixes, weights in blends:
        for prefix in prefixes:
            if not IndexedDataset.exists(prefix):
                yield f"{prefix}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not 0 < weight < float("inf"):
                yield f"the weight {weight:g} of {prefix} must be above 0; leave the corpus out, or give it a share"


def the_model_knows_the_tokens(run: Run) -> Iterable[str]:
    for prefix, likeness in _tokenizers(run):
        if isinstance(likeness, UserError):
            yield str(likeness)
        elif likeness is TokenizerMatch.DIFFERENT:
            yield (
                f"{prefix} was made with another tokenizer than the model's, so its ids mean other tokens "
                f"({manifest_path(prefix)} and {run.checkpoint}/hf differ); tokenize the text again with "
                f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {run.checkpoint}/hf"
            )


def tokenizers_that_may_differ(run: Run) -> Iterable[str]:
    for prefix, likeness in _tokenizers(run):
        if likeness is None:
            yield f"{manifest_path(prefix)} is missing, so nothing says which tokenizer {prefix} was made with"
        elif likeness is TokenizerMatch.SAME_TOKENS:
            yield f"{prefix} was made with another tokenizer than the model's; its ids mean the same tokens"
        elif likeness is TokenizerMatch.UNKNOWN:
            yield f"{run.checkpoint}/hf holds no tokenizer, so that of {prefix} can't be compared with the model's"


def documents_are_kept_apart_by_our_attention(run: Run) -> Iterable[str]:
    """Rotary positions are relative, so that only attention can carry anything from one document to the next."""
    if run.args.reset_attention_mask:
        yield f"--reset-attention-mask has no effect: attention builds its own mask; use {_APART}"
    if run.args.reset_position_ids:
        yield f"--reset-position-ids has no effect: the model's rotary positions are relative; use {_APART}"
    if run.args.dataloader_inter_document_masking and run.args.transformer_impl != "local":
        yield (
            f"{_APART} works with PyTorch's attention only, not with Transformer Engine's so far; add "
            "--transformer-impl local, or drop it"
        )


def data_flags_are_read(run: Run) -> Iterable[str]:
    for name in _UNREAD:
        if name in run.typed:
            yield f"{run.typed[name]} has no effect here; drop it"


def _blends(run: Run) -> list[tuple[list[str], list[float] | None]]:
    """Prefixes and weights of training, validation and test data; none where another check complains."""
    if sum(name in run.typed for name in _DATA) != 1:
        return []
    blend, per_split = get_blend_and_blend_per_split(run.args)
    return [part for part in (blend, *(per_split or ())) if part is not None]


def _tokenizers(run: Run) -> Iterable[tuple[str, TokenizerMatch | UserError | None]]:
    """Every corpus, and how its tokenizer compares with the model's; None: it has no manifest.

    One rank looks: loading a tokenizer takes seconds.
    """
    if run.checkpoint is None or os.environ.get("RANK", "0") != "0":
        return
    try:
        prefixes = dict.fromkeys(prefix for prefixes, _ in _blends(run) for prefix in prefixes)
        prefixes |= dict.fromkeys(item.partition("=")[2] for item in run.args.validation_data or [])
    except (AssertionError, OSError, ValueError, KeyError, TypeError):
        return  # data_is_there says so
    for prefix in prefixes:
        if not prefix or not IndexedDataset.exists(prefix):
            continue
        try:
            manifest = Manifest.read(prefix)
        except UserError as error:
            yield prefix, error
            continue
        if manifest is None:
            yield prefix, None
            continue
        yield prefix, _likeness(json.dumps(asdict(manifest.tokenizer)), run.checkpoint / HF_FOLDER)


@functools.cache
def _likeness(tokenizer: str, folder: Path) -> TokenizerMatch:
    """Of a manifest's tokenizer, as JSON; corpora mostly share one, and each is asked about twice."""
    return compare_tokenizers(TokenizerRecord(**json.loads(tokenizer)), folder)


CHECKS = (
    data_is_named_once,
    data_is_there,
    the_model_knows_the_tokens,
    documents_are_kept_apart_by_our_attention,
    data_flags_are_read,
)
