"""Training and validation corpora: they exist, and their token IDs are the model's."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list

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
from moelpr.train.arguments.early import missing_corpus
from moelpr.train.arguments.requested import RequestedRun


def check_corpora(run: RequestedRun) -> Iterable[str]:
    """Training corpora exist, and their weights are valid."""
    prefixes, weights = training_blend(run)
    if run.args.data_path is not None and not prefixes:
        yield "--data-path must be prefixes of corpora, or a weight before each; pass --data-path [WEIGHT] PREFIX …"
    yield from (missing_corpus(prefix) for prefix in prefixes if not IndexedDataset.exists(prefix))
    for prefix, weight in zip(prefixes, weights or (), strict=False):
        if not 0 < weight < float("inf"):
            yield f"the weight of {prefix} must be above 0, got {weight:g}; change it, or omit the corpus"


def check_original_tokens(run: RequestedRun) -> Iterable[str]:
    """The LPR loss has original-language tokens in at least one training corpus."""
    prefixes, coeff = training_blend(run)[0], run.lpr_loss_coeff
    if not run.is_moe or not coeff > 0 or not prefixes or not all(map(IndexedDataset.exists, prefixes)):
        return
    try:
        if not any(LanguageBits(language_bits_path(prefix)).num_original for prefix in prefixes):
            yield (
                f"--data-path {' '.join(prefixes)} contains no original-language tokens, which --lpr-loss-coeff "
                f"{coeff:g} requires; add original-language text, or pass --lpr-loss-coeff 0"
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
            yield missing_corpus(prefix)
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


def check_validation_flags(run: RequestedRun) -> Iterable[str]:
    """Validation has data; otherwise Megatron fails at the first pass, after --eval-interval steps."""
    if run.args.eval_iters and not run.args.validation_data:
        yield "--eval-iters requires --validation-data LANG=PREFIX; add it, or remove --eval-iters"


def check_skipped_steps(run: RequestedRun) -> Iterable[str]:
    """Megatron reads the data of skipped steps itself, in ways that end in a TypeError or a rank that waits."""
    if not run.args.iterations_to_skip:
        return
    if (last := run.args.train_iters) in run.args.iterations_to_skip:
        yield (
            f"--iterations-to-skip can't contain the last step, {last}, because Megatron would not save it; skip "
            "others, or train fewer steps"
        )
    if run.layout.vpp > 1:
        yield "--iterations-to-skip does not work with virtual pipeline stages; remove one of them"
    if run.args.dataloader_inter_document_masking and run.layout.tp > 1:
        yield (
            "--iterations-to-skip does not work with --dataloader-inter-document-masking and tensor parallelism; "
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


def _can_be_cached(folder: Path) -> bool:
    """Whether files can be written there; a read-only folder with some may have those of this run."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.access(existing, os.W_OK | os.X_OK) or any(folder.glob("*.npy"))


def training_blend(run: RequestedRun) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of the training data; without prefixes if the flags are invalid."""
    try:
        return get_blend_from_list(run.args.data_path) or ([], None)
    except (AssertionError, ValueError):  # reported by `check_corpora`
        return [], None


def _existing_corpora(run: RequestedRun) -> list[str]:
    """Prefixes of all corpora, each once."""
    prefixes = dict.fromkeys(training_blend(run)[0])
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
