"""Training and validation corpora: they exist, and their token IDs are the model's."""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

from moelpr.arguments.settings import RunSettings
from moelpr.data.language_bits import LanguageBits, language_bits_path
from moelpr.data.manifest import Manifest, TokenizerMatch, TokenizerRecord, compare_tokenizers, manifest_path
from moelpr.errors import UserError
from moelpr.run_folder import HF_FOLDER

_DATA = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")

# Data flags that Megatron's entry scripts read and this trainer does not.
_IGNORED = (
    "per_dataset_sequences_path",
    "dataloader_fast_cache_load",
    "dataloader_defer_npy_index_mmap",
    "object_storage_cache_path",
    "allow_ambiguous_pad_tokens",
)

# Flags of Megatron's own validation, which --validation-data replaces.
_MEGATRON_VALIDATION = (
    "valid_data_path", "full_validation", "multiple_validation_sets", "validation_set_names", "split",
)  # fmt: skip

_MASKING = "--dataloader-inter-document-masking"
_BLEND_ERRORS = (AssertionError, OSError, ValueError, KeyError, TypeError)


def check_data_flags(run: RunSettings) -> Iterable[str]:
    """Training data is given once, by a flag that has an effect."""
    explicit = run.explicit_args
    if "mock_data" in explicit:
        yield "--mock-data is not supported, because it has no language bits; pass --data-path PREFIX"
    else:
        given = [run.flag(name) for name in _DATA if name in explicit]
        if len(given) > 1:
            yield f"{' and '.join(given)} are mutually exclusive; keep one of them"
        elif not given and run.recipe_is_read:
            yield "training data is required; pass --data-path PREFIX (data_tools/preprocess_data.py makes a corpus)"
    yield from (f"{run.flag(name)} has no effect; remove it" for name in _IGNORED if name in explicit)


def check_corpora(run: RunSettings) -> Iterable[str]:
    """Training corpora exist, and their weights are valid."""
    try:
        blends = _blends(run)
    except _BLEND_ERRORS as error:
        yield f"cannot read the training data from the flags ({error}); pass --data-path [WEIGHT] PREFIX …"
        return
    for prefixes, weights in blends:
        yield from (_missing(prefix) for prefix in prefixes if not IndexedDataset.exists(prefix))
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not 0 < weight < float("inf"):
                yield f"the weight of {prefix} must be above 0, got {weight:g}; change it, or omit the corpus"


def check_tokenizers(run: RunSettings) -> Iterable[str]:
    """Corpora contain the token IDs of the model."""
    for prefix, match in _tokenizer_matches(run):
        if isinstance(match, UserError):
            yield str(match)
        elif match is TokenizerMatch.DIFFERENT:
            yield (
                f"the token IDs of {prefix} are not the model's ({manifest_path(prefix)} names another tokenizer than "
                f"{run.checkpoint}/hf); tokenize the text again with --tokenizer-type HuggingFaceTokenizer "
                f"--tokenizer-model {run.checkpoint}/hf"
            )


def note_tokenizers(run: RunSettings) -> Iterable[str]:
    """Corpora whose tokenizer may differ from the model's."""
    for prefix, match in _tokenizer_matches(run):
        if match is None:
            yield f"the tokenizer of {prefix} is unknown: {manifest_path(prefix)} is missing"
        elif match is TokenizerMatch.SAME_TOKENS:
            yield f"{prefix} was made with a different tokenizer than the model's, but its token IDs mean the same"
        elif match is TokenizerMatch.UNKNOWN:
            yield f"cannot compare the tokenizer of {prefix} with the model's: {run.checkpoint}/hf has no tokenizer"


def check_document_masking(run: RunSettings) -> Iterable[str]:
    """Rotary positions are relative, so only attention can connect one document with the next."""
    if run.args.reset_attention_mask:
        yield f"--reset-attention-mask has no effect, because attention builds its own mask; use {_MASKING}"
    if run.args.reset_position_ids:
        yield f"--reset-position-ids has no effect, because rotary positions are relative; use {_MASKING}"
    if run.args.dataloader_inter_document_masking and run.args.transformer_impl != "local":
        yield f"{_MASKING} does not support Transformer Engine yet; add --transformer-impl local, or remove it"


def check_validation_data(run: RunSettings) -> Iterable[str]:
    """Validation corpora exist, one per language."""
    seen = set()
    for item in run.args.validation_data or []:
        language, _, prefix = item.partition("=")
        if not language or not prefix:
            yield f"--validation-data expects LANG=PREFIX, got {item}; for example el=data/el-test_text_document"
        elif language in seen:
            yield f"--validation-data expects one corpus per language, got several for {language}"
        seen.add(language)
        if prefix:
            yield from _validation_corpus_problems(item, prefix)


def _validation_corpus_problems(item: str, prefix: str) -> Iterable[str]:
    if not IndexedDataset.exists(prefix):
        yield _missing(prefix)
    elif Path(language_bits_path(prefix)).exists():  # else the dataset reports it
        try:
            bits = LanguageBits(language_bits_path(prefix))
        except UserError as error:
            yield str(error)
            return
        if len(bits) < 2:
            yield f"--validation-data {item} must have at least 2 tokens, got {len(bits)}; use a corpus with text"
        elif 0 < bits.num_original < len(bits):
            yield (
                f"--validation-data {item} contains text of original and of expanded languages; use one corpus per "
                "language"
            )


def check_validation_flags(run: RunSettings) -> Iterable[str]:
    """No other flag controls validation, and its numbers are valid."""
    if not run.args.validation_data:
        return
    for name in _MEGATRON_VALIDATION:
        if name in run.explicit_args and not (name == "split" and _is_training_only(run.args.split)):
            yield f"{run.flag(name)} and --validation-data are mutually exclusive; keep --validation-data"
    if run.args.eval_interval is not None and run.args.eval_interval < 1:
        yield f"--eval-interval must be at least 1, got {run.args.eval_interval}"
    if run.args.eval_iters is not None and run.args.eval_iters < 0:
        yield f"--eval-iters must be at least 1, or 0 for the full corpora, got {run.args.eval_iters}"


def _is_training_only(split: str | None) -> bool:
    return split is None or all(not float(part) for part in split.split(",")[1:])


def _missing(prefix: str) -> str:
    return f"{prefix}.bin or {prefix}.idx is missing; make the corpus with data_tools/preprocess_data.py"


def _blends(run: RunSettings) -> list[tuple[list[str], list[float] | None]]:
    """Prefixes and weights of training, validation and test data; none if `check_data_flags` reports a problem."""
    if sum(name in run.explicit_args for name in _DATA) != 1:
        return []
    blend, per_split = get_blend_and_blend_per_split(run.args)
    return [part for part in (blend, *(per_split or ())) if part is not None]


def _tokenizer_matches(run: RunSettings) -> Iterable[tuple[str, TokenizerMatch | UserError | None]]:
    """Each corpus, and how its tokenizer compares with the model's; None if it has no manifest.

    Only rank 0 compares, because loading a tokenizer takes seconds.
    """
    if run.checkpoint is None or os.environ.get("RANK", "0") != "0":
        return
    try:
        prefixes = dict.fromkeys(prefix for prefixes, _ in _blends(run) for prefix in prefixes)
    except _BLEND_ERRORS:
        return  # reported by `check_corpora`
    prefixes |= dict.fromkeys(item.partition("=")[2] for item in run.args.validation_data or [])
    for prefix in prefixes:
        if not prefix or not IndexedDataset.exists(prefix):
            continue
        try:
            manifest = Manifest.read(prefix)
        except UserError as error:
            yield prefix, error
            continue
        folder = run.checkpoint / HF_FOLDER
        yield prefix, None if manifest is None else _compare(json.dumps(asdict(manifest.tokenizer)), folder)


@functools.cache
def _compare(tokenizer: str, folder: Path) -> TokenizerMatch:
    """Compare a manifest's tokenizer, as JSON; cached, because most corpora share one and it is needed twice."""
    return compare_tokenizers(TokenizerRecord(**json.loads(tokenizer)), folder)
