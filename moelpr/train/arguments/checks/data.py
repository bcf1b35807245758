"""Training and validation corpora: they exist, and their token IDs are the model's."""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

from moelpr.base import ranks
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.base.run_folder import HF_FOLDER
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.dataset import TaggedGPTDataset
from moelpr.data.language_bits import LanguageBits, language_bits_path, loss_bits_path
from moelpr.data.manifest import Manifest, manifest_path
from moelpr.data.tokenizer_match import TokenizerMatch, compare_tokenizers
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE
from moelpr.train.arguments.early import DATA
from moelpr.train.arguments.requested import RequestedRun

# Flags of Megatron's own validation, which --validation-data replaces.
_MEGATRON_VALIDATION = "valid_data_path full_validation multiple_validation_sets validation_set_names split".split()

_BLEND_ERRORS = (AssertionError, OSError, ValueError, KeyError, TypeError)


def check_corpora(run: RequestedRun) -> Iterable[str]:
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


def check_original_tokens(run: RequestedRun) -> Iterable[str]:
    """The LPR loss has original-language tokens in at least one training corpus."""
    prefixes = [prefix for prefixes, _ in _valid_blends(run)[:1] for prefix in prefixes]
    coeff = run.lpr_loss_coeff
    if not run.is_moe or not coeff > 0 or not prefixes or not all(map(IndexedDataset.exists, prefixes)):
        return
    try:
        if not any(LanguageBits(language_bits_path(prefix)).num_original for prefix in prefixes):
            flag = next(run.flag(name) for name in DATA if name in run.explicit_args)
            yield (
                f"{flag} {' '.join(prefixes)} contains no original-language tokens, which --lpr-loss-coeff {coeff:g} "
                "requires; add original-language text, or pass --lpr-loss-coeff 0"
            )
    except UserError as error:
        yield str(error)


def check_conversations(run: RequestedRun) -> Iterable[str]:
    """The stage sft has conversations, and each fits a sequence."""
    prefixes, _ = training_blend(run)
    if run.args.stage == "sft" and prefixes and all(map(IndexedDataset.exists, prefixes)):
        if not any(map(has_conversations, prefixes)):
            yield (
                f"--stage sft requires conversations, but {' '.join(prefixes)} has none; make a corpus of them with "
                "moelpr data preprocess --conversations"
            )
    for prefix in filter(has_conversations, _existing_corpora(run)):
        try:
            longest = int(CorpusIndex.open(prefix).sequence_lengths.max(initial=0))
        except UserError as error:
            yield str(error)
            continue
        if longest > (run.args.seq_length or longest):
            yield (
                f"{prefix} has a conversation of {longest:,} tokens, more than --seq-length {run.args.seq_length:,}; "
                f"raise it, or preprocess with --max-tokens {run.args.seq_length} --on-error skip"
            )


def has_conversations(prefix: str) -> bool:
    """Whether a corpus has conversations, which are read whole."""
    return loss_bits_path(prefix).exists()


def check_tokenizers(run: RequestedRun) -> Iterable[str]:
    """Corpora contain the token IDs of the model."""
    yield from (message for is_wrong, message in _compare_tokenizers(run) if is_wrong)


def note_tokenizers(run: RequestedRun) -> Iterable[str]:
    """Corpora whose tokenizer may differ from the model's."""
    yield from (message for is_wrong, message in _compare_tokenizers(run) if not is_wrong)


def damaged_corpora(run: RequestedRun) -> Iterable[str]:
    """A message for each corpus that differs from its checksums. Not a check: it is for a run without other problems.

    One rank of each node reads, because nodes may have their own copies.
    """
    if (verify := Verify(run.args.verify_corpus)) is Verify.NONE or ranks.local_rank() != 0:
        return
    for prefix in _existing_corpora(run):
        try:
            for path in (language_bits_path(prefix), *([loss_bits_path(prefix)] if has_conversations(prefix) else [])):
                LanguageBits(path).verify()
            if manifest := Manifest.read(prefix):
                manifest.verify_files(prefix, verify)
        except UserError as error:
            yield str(error)


def check_validation_data(run: RequestedRun) -> Iterable[str]:
    """Validation corpora exist, one per language."""
    seen = set()
    for item in run.args.validation_data or []:
        language, _, prefix = item.partition("=")
        if not language or not prefix:
            yield f"--validation-data expects LANG=PREFIX, got {item}; for example el=data/el-test_text_document"
        elif canonical(language) in seen:
            yield f"--validation-data expects one corpus per language, got several for {language}"
        seen.add(canonical(language))
        if prefix and not IndexedDataset.exists(prefix):
            yield _missing(prefix)
        elif prefix and language_bits_path(prefix).exists():  # else the dataset reports it
            try:
                bits = LanguageBits(language_bits_path(prefix))
            except UserError as error:
                yield str(error)
                continue
            if (number := bits.num_tokens) < 2:
                yield f"--validation-data {item} must have at least 2 tokens, got {number}; use a corpus with text"
            elif 0 < bits.num_original < number:
                yield f"--validation-data {item} has text of original and expanded languages; use one corpus of each"


def check_split(run: RequestedRun) -> Iterable[str]:
    """--split divides the data of --data-path; Megatron reads any digits that it finds, so that -1 is 1."""
    if run.args.split is None:
        return
    parts = [part.strip() for part in run.args.split.split(",")]
    is_number = all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts)
    if not is_number or len(parts) > 3 or float(parts[0]) == 0:
        yield (
            f"--split must be up to three comma-separated numbers for training, validation and test data, the first "
            f"above 0, got {run.args.split}; for example 100,0,0"
        )
    for name in ("train_data_path", "per_split_data_args_path"):
        if getattr(run.args, name):
            yield f"--split divides the data of --data-path, and {run.flag(name)} has that of each; remove --split"


def check_validation_flags(run: RequestedRun) -> Iterable[str]:
    """Validation has data, from one source; otherwise Megatron fails at the first pass, after --eval-interval steps."""
    args, share = run.args, re.match(r"[^,]*,[^,]*[1-9]", run.args.split or "")
    if args.validation_data:
        for name in _MEGATRON_VALIDATION:
            is_training_only = name == "split" and not re.search(",.*[1-9]", args.split or "")
            if name in run.explicit_args and not is_training_only:
                yield f"{run.flag(name)} and --validation-data are mutually exclusive; keep --validation-data"
    elif not (args.valid_data_path or args.per_split_data_args_path or share):
        for name in ("eval_iters", "full_validation"):
            if name in run.explicit_args and getattr(args, name):
                yield (
                    f"{run.flag(name)} requires validation data, which is missing; pass --validation-data LANG=PREFIX, "
                    f"or remove {run.flag(name)}"
                )
    elif args.full_validation and args.data_path and any(weights for _, weights in _valid_blends(run)):
        yield (
            "--full-validation does not work with weights in --data-path; pass --validation-data LANG=PREFIX instead, "
            "or remove the weights"
        )


def check_skipped_steps(run: RequestedRun) -> Iterable[str]:
    """Megatron reads the data of skipped steps itself, in ways that end in a TypeError or a rank that waits."""
    for name in ("iterations_to_skip", "result_rejected_tracker_filename"):
        if not getattr(run.args, name):
            continue
        last = run.args.train_iters or (run.args.train_samples or 0) // max(run.args.global_batch_size or 1, 1)
        if name == "iterations_to_skip" and last in run.args.iterations_to_skip:
            yield (
                f"--iterations-to-skip can't contain the last step, {last}, because Megatron would not save it; skip "
                "others, or train fewer steps"
            )
        if run.layout.vpp > 1:
            yield f"{run.flag(name)} does not work with virtual pipeline stages; remove one of them"
        if run.args.dataloader_inter_document_masking and run.layout.tp > 1:
            yield (
                f"{run.flag(name)} does not work with --dataloader-inter-document-masking and tensor parallelism; "
                "remove one of them"
            )


def check_cache_folders(run: RequestedRun) -> Iterable[str]:
    """Megatron writes the order of samples next to each corpus or to --data-cache-path, unless it is there already."""
    fix = "pass --data-cache-path DIR with a folder that all nodes share"
    if given := run.args.data_cache_path:
        if not _can_be_cached(Path(given)):
            yield f"the order of samples cannot be saved in --data-cache-path {given}: no permission to write; {fix}"
        return
    for prefix in _existing_corpora(run):
        if not _can_be_cached(Path(prefix) / "cache" / f"{TaggedGPTDataset.__name__}_indices"):
            yield f"the order of samples cannot be saved beside {prefix}, in a folder without write permission; {fix}"


def training_share(split: str | None) -> float:
    """The share of each corpus that --split leaves for training."""
    shares = [float(share) for share in (split or "1").split(",")]
    return shares[0] / sum(shares)


def _can_be_cached(folder: Path) -> bool:
    """Whether files can be written there; a read-only folder with some may have those of this run."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.access(existing, os.W_OK | os.X_OK) or any(folder.glob("*.npy"))


def _missing(prefix: str) -> str:
    return f"{prefix}.bin or {prefix}.idx is missing; make the corpus with moelpr data preprocess"


def _blends(run: RequestedRun) -> list[tuple[list[str], list[float] | None]]:
    """Prefixes and weights of training, validation and test data; empty unless one flag gives them."""
    if sum(name in run.explicit_args for name in DATA) != 1:
        return []
    blend, per_split = get_blend_and_blend_per_split(run.args)
    return [part for part in (blend, *(per_split or ())) if part is not None]


def _valid_blends(run: RequestedRun) -> list[tuple[list[str], list[float] | None]]:
    try:
        return _blends(run)
    except _BLEND_ERRORS:
        return []  # reported by `check_corpora`


def training_blend(run: RequestedRun) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of the training data; without prefixes if the flags are invalid."""
    return next(iter(_valid_blends(run)), ([], None))


def _existing_corpora(run: RequestedRun) -> list[str]:
    """Prefixes of all corpora, each once."""
    prefixes = dict.fromkeys(prefix for prefixes, _ in _valid_blends(run) for prefix in prefixes)
    prefixes |= dict.fromkeys(item.partition("=")[2] for item in run.args.validation_data or [])
    return [prefix for prefix in prefixes if prefix and IndexedDataset.exists(prefix)]


def _compare_tokenizers(run: RequestedRun) -> Iterable[tuple[bool, str]]:
    """Whether a corpus cannot be used, and a message, for each whose tokenizer may not be the model's.

    Only rank 0 compares, because loading a tokenizer takes seconds.
    """
    if run.checkpoint is None or not ranks.is_first_rank():
        return
    hf = run.checkpoint / HF_FOLDER
    again = f"tokenize the text again with --tokenizer-type HuggingFaceTokenizer --tokenizer-model {hf}"
    for prefix in _existing_corpora(run):
        try:
            manifest = Manifest.read(prefix)
            match = None if manifest is None else _compare(manifest.tokenizer, hf)
        except UserError as error:
            yield True, str(error)
            continue
        messages = {
            None: f"{manifest_path(prefix)} is missing, so the tokenizer and the token IDs of {prefix} are unverified",
            TokenizerMatch.SAME_TOKENS: f"the tokenizer of {prefix} is not the model's, but its token IDs are the same",
            TokenizerMatch.UNKNOWN: f"cannot compare the tokenizer of {prefix} with the model's: {hf} has no tokenizer",
            TokenizerMatch.NOT_EXTENDED: f"{prefix} was made with the tokenizer before its extension, so it has none "
            f"of the model's new tokens (see {hf / VOCABULARY_EXTENSION_FILE}); {again}",
            TokenizerMatch.DIFFERENT: f"the token IDs of {prefix} are not the model's (see {manifest_path(prefix)} "
            f"and {hf}); {again}",
        }
        if match in messages:
            yield match in (TokenizerMatch.NOT_EXTENDED, TokenizerMatch.DIFFERENT), messages[match]


_compare = functools.cache(compare_tokenizers)  # most corpora share a tokenizer, and it is needed twice
