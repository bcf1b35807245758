"""From the command line to a plan: the job's input files, its outputs, its tokenizer and its languages."""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.corpus import shard_prefix
from data_tools.corpus.corpus_writer import check_output
from data_tools.preprocessing import tagging
from data_tools.preprocessing.batches import ReadCursor, Reader
from data_tools.preprocessing.encode import VALIDATION, Encoder
from data_tools.preprocessing.job_tokenizer import JobTokenizer, load_job_tokenizer
from data_tools.preprocessing.sampling import sample_documents
from data_tools.preprocessing.sources import (
    Form,
    Share,
    Source,
    find_files,
    open_source,
    shares_of,
)  # fmt: skip
from data_tools.preprocessing.tagging import UNDETECTED, Bits, Detector, Tagger
from moelpr.data.tokenizers.gigatoken import choose_library
from moelpr.process.command import check_is_utf8
from moelpr.process.errors import UserError
from moelpr.store.documents import BadLine

_LANGUAGES = {"old": "original", "original": "original", "new": "expanded", "expanded": "expanded"}
_SAMPLE_PLACES = 16
_SAMPLE_CHARACTERS = 1 << 15  # per place


@dataclass(frozen=True)
class Dataset:
    """Input files that share a language and a key.

    Attributes:
        name: name in the registry; "" for files named by --input.
        language: "original" or "expanded"; "" if each document has its own.
        key: key of the text in each document.
    """

    name: str
    sources: list[Source]
    language: str
    key: str


class Plan:
    """What a job does, after all checks that are possible before the work starts.

    Attributes:
        output_prefix: prefix of all the job's files, including its shard.
        prefixes: corpus prefixes by the corpus's name within the job.
        sources: all input files.
        shares: this job's part of them.
        chosen: sampled documents of each share; None: all.
        columns: for each dataset the keys that are read.
        settings: everything that determines the output's bytes, by flag.
        shard_of: `Manifest.shard_of`.
        notes: messages for the user.
        needs_text: whether a corpus without tokens is an error; a shard may be empty.
        needed_languages: original languages that must occur: after a typo, their documents would be tagged expanded,
            unless all expanded languages are named. A shard may lack some.

    Raises:
        UserError: An input or the tokenizer can't be used, or the output already exists.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.output_prefix = _with_shard(arguments, arguments.output_prefix)
        self.prefixes = _prefixes(arguments)
        for prefix in self.prefixes.values():
            check_output(prefix, arguments.overwrite or (arguments.resume and os.path.exists(self.unfinished_folder)))
        if arguments.dataset:
            names = [name.strip() for name in arguments.dataset.split(",") if name.strip()]
            datasets = _read_registry(arguments.dataset_info, names, arguments.dataset_dir)
        else:
            sources = [open_source(path) for path in find_files(arguments.input)]
            datasets = [Dataset("", sources, arguments.language or "", arguments.json_keys[0])]
        self.sources = [source for dataset in datasets for source in dataset.sources]
        files = [source for source in self.sources if source.form is not Form.STREAM]
        self.notes = [f"{file.path} is empty" for file in files if not file.bytes]
        self.shares = list(shares_of(self.sources, arguments.shard or 0, arguments.num_shards))
        keys = [arguments.json_keys if arguments.input else [dataset.key] for dataset in datasets]
        check_is_utf8(arguments.tokenizer_model, "tokenizer")
        special_tokens = not arguments.tokenizer_hf_no_include_special_tokens
        self.tokenizer = load_job_tokenizer(
            arguments.tokenizer_type, arguments.tokenizer_model, special_tokens, arguments.eod_token
        )
        if arguments.append_eod and self.tokenizer.record.eod_id is None:
            raise UserError(
                f"--append-eod requires an end-of-document token, but {arguments.tokenizer_model} has none; name one "
                "with --eod-token"
            )
        self.encoder = _encoder(arguments, datasets, keys, self.tokenizer)
        for share in self.shares:
            if share.source.sha1 is not None:
                _verify_checksum(share.source)
        self.chosen: list[NDArray[np.int64]] | None = None
        if arguments.max_samples is not None:
            names = [dataset.name for dataset in datasets]
            self.chosen, notes = sample_documents(self.shares, names, arguments.max_samples, arguments.seed)
            self.notes += notes
        tagger_keys = self.encoder.tagger.columns()
        self.columns = [list(dict.fromkeys([*([] if arguments.spans_key else own), *tagger_keys])) for own in keys]
        if arguments.tokenizer_backend != "reference":
            sample = _sample(self.shares, self.columns, self.encoder)
            is_required = arguments.tokenizer_backend == "gigatoken"
            self.encoder.tokenizer, reason = choose_library(self.tokenizer.tokenizer, sample, is_required)
            if reason:
                self.notes.append(f"tokenizing with {self.encoder.tokenizer.name}, not gigatoken: {reason}")
        self._states = [None if source.form is Form.STREAM else _state_of(source) for source in self.sources]
        self.settings = _settings(arguments, self.tokenizer)
        self.settings["input files"] = [
            source.path if state is None else [os.path.abspath(source.path), *_described(state)]
            for source, state in zip(self.sources, self._states, strict=True)
        ]
        if arguments.dataset:
            self.settings["entries of --dataset-info"] = [
                [dataset.name, dataset.language, dataset.key] for dataset in datasets
            ]
        self.shard_of = _shard_of(self.settings, self.sources) if arguments.num_shards > 1 else None
        self.needs_text = arguments.num_shards == 1
        is_certain = arguments.expanded_languages or not self.needs_text
        self.needed_languages = Bits.from_names(None if is_certain else arguments.original_languages, None).original

    def check_inputs(self) -> None:
        """UserError if a file is not the one that was there at the start: parts of both would be in the corpus.

        Lines may have been appended to plain JSON lines; they are not read.
        """
        for source, before in zip(self.sources, self._states, strict=True):
            if before is None:
                continue
            now = _state_of(source)
            has_grown = source.form is Form.LINES and now.st_size > before.st_size
            if now.st_ino != before.st_ino or not (has_grown or _described(now) == _described(before)):
                raise UserError(
                    f"{source.path} has changed while it was read, so the corpus would contain parts of two versions; "
                    "start again when nothing writes it"
                )

    @property
    def skipped_path(self) -> Path:
        """List of skipped lines."""
        return Path(f"{self.output_prefix}.skipped.txt")

    @property
    def unfinished_folder(self) -> Path:
        """Folder of the job's files until they are complete."""
        path = Path(self.output_prefix)
        return path.with_name(f".{path.name}.unfinished")


def _prefixes(arguments: argparse.Namespace) -> dict[str, str]:
    prefix, keys = arguments.output_prefix, arguments.json_keys
    prefixes = {key: f"{prefix}_{key}_document" for key in keys}
    if arguments.validation_share:
        prefixes |= {f"{key} {VALIDATION}": f"{prefix}_{VALIDATION}_{key}_document" for key in keys}
    if slashed := [key for key in keys if "/" in key]:
        raise UserError(f"--json-keys {slashed[0]} would be part of the names of files; rename the key, without /")
    if len(set(prefixes.values())) < len(prefixes):
        raise UserError(f"--json-keys {' '.join(keys)} give two corpora one name; rename a key")
    return {name: _with_shard(arguments, path) for name, path in prefixes.items()}


def _with_shard(arguments: argparse.Namespace, prefix: str) -> str:
    return prefix if arguments.num_shards == 1 else shard_prefix(prefix, arguments.shard, arguments.num_shards)


def _read_registry(registry: Path, names: list[str], folder: Path) -> list[Dataset]:
    """Read the named entries of a registry, dataset_info.json as the published code has it."""
    try:
        entries = json.loads(registry.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read the registry {registry} ({reason}); pass a JSON file as --dataset-info") from None
    if not isinstance(entries, dict):
        raise UserError(f"the registry {registry} must contain a JSON object of datasets")
    if len(set(names)) < len(names):
        raise UserError(f"--dataset {','.join(names)} names a dataset twice")
    datasets = []
    for index, name in enumerate(names):
        if name not in entries:
            near = get_close_matches(name, entries, 3) or sorted(entries)[:5]
            raise UserError(f"the registry {registry} has no dataset {name}; choose one of {', '.join(near)}")
        try:
            datasets.append(_dataset(name, entries[name], folder, index))
        except ValueError as error:
            raise UserError(f"the dataset {name} in {registry}: {error}") from error
    return datasets


def _dataset(name: str, entry: Any, folder: Path, index: int) -> Dataset:
    if not isinstance(entry, dict):
        raise UserError("expected an object")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        raise UserError("it has no file_name; name a local file or folder, as nothing is downloaded from hubs")
    language = entry.get("language")
    if not isinstance(language, str) or language not in _LANGUAGES:
        raise UserError(f'its language must be "old" (original) or "new" (expanded), got {json.dumps(language)}')
    columns = entry.get("columns", {})
    key = columns.get("prompt", "text") if isinstance(columns, dict) else None
    if not isinstance(key, str):
        raise UserError('its columns have no "prompt", the key of the text')
    if entry.get("formatting", "alpaca") != "alpaca":
        raise UserError(f"its formatting {json.dumps(entry['formatting'])} is unsupported; use plain documents")
    path = folder / file_name
    if not path.exists():
        raise UserError(f"{path} does not exist")
    sha1 = entry.get("file_sha1")
    if sha1 is not None and (not isinstance(sha1, str) or len(sha1) != 40):
        raise UserError(f"its file_sha1 must be 40 hexadecimal digits, got {json.dumps(sha1)}")
    if sha1 and path.is_dir():
        raise UserError("its file_name is a folder, which has no SHA-1; remove file_sha1")
    expected = sha1.lower() if sha1 else None
    sources = [open_source(file, index, expected) for file in find_files([str(path)])]
    return Dataset(name, sources, _LANGUAGES[language], key)


def _verify_checksum(source: Source) -> None:
    """Compare a file with the SHA-1 that its registry states."""
    with open(source.path, "rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found != source.sha1:
        raise UserError(
            f"{source.path} has SHA-1 {found}, its registry expects {source.sha1}; copy it again or correct file_sha1"
        )


def _encoder(
    arguments: argparse.Namespace, datasets: list[Dataset], keys: list[list[str]], tokenizer: JobTokenizer
) -> Encoder:
    bits, tagger = _languages(arguments, datasets)
    return Encoder(
        tokenizer=tokenizer.tokenizer,
        vocab_size=tokenizer.record.vocab_size,
        prefix=tokenizer.prefix,
        suffix=tokenizer.suffix,
        eod_id=tokenizer.record.eod_id if arguments.append_eod else None,
        tagger=tagger,
        bits=bits,
        keys=keys,
        corpora=arguments.json_keys,
        skips_bad_lines=arguments.on_error == "skip",
        skips_undetected=arguments.undetected == "skip",
        validation_share=arguments.validation_share,
        seed=arguments.seed,
        auditor=_detector(arguments, bits) if arguments.audit else None,
    )


def _languages(arguments: argparse.Namespace, datasets: list[Dataset]) -> tuple[Bits, Tagger]:
    if arguments.dataset or arguments.language:
        pairs = [(dataset.name or dataset.language, dataset.language) for dataset in datasets]
        groups = [frozenset(name for name, bit in pairs if bit == group) for group in ("original", "expanded")]
        return Bits(*groups), tagging.OneLanguage([name for name, _ in pairs])
    bits = Bits.from_names(arguments.original_languages, arguments.expanded_languages)
    if arguments.language_key:
        return bits, tagging.LanguageKey(arguments.language_key, bits)
    if arguments.spans_key:
        return bits, tagging.LanguageSpans(arguments.spans_key, bits)
    detector = _detector(arguments, bits)
    if arguments.undetected == "original":
        bits = Bits(bits.original | {UNDETECTED}, bits.expanded)
    return bits, tagging.DetectedLanguages(detector, arguments.detect_language == "line")


def _detector(arguments: argparse.Namespace, bits: Bits) -> Detector:
    """Return a detector of the named languages, or of any language unless all are named."""
    is_complete = bits.expanded and not arguments.dataset and not arguments.language
    return Detector(bits.original | bits.expanded if is_complete else frozenset(), arguments.min_confidence)


def _sample(shares: list[Share], columns: list[list[str]], encoder: Encoder) -> list[str]:
    """Return some texts from all over the input, to compare tokenizer libraries on. Malformed lines are ignored."""
    texts: list[str] = []
    places = _spread([share for share in shares if share.source.form is not Form.STREAM])
    reader = Reader(places, columns, None, spool=None)
    for index, place in enumerate(places):
        batch = next(reader.batches(ReadCursor(index)), None)
        if batch is None or batch.share.source != place.source or batch.is_long_line:
            continue
        characters = 0
        for item in batch.items():
            try:
                found = encoder.texts(item, batch.share.source.dataset) or []
            except BadLine:
                continue
            texts += [text.tagged.text[:_SAMPLE_CHARACTERS] for text in found]
            characters += sum(len(text.tagged.text) for text in found)
            if characters >= _SAMPLE_CHARACTERS:
                break
    return texts


def _spread(shares: list[Share]) -> list[Share]:
    """Return places to sample, evenly over the shares' bytes; an archive can be read only from its start."""
    total = sum(share.stop - share.start for share in shares)
    offsets = [total * index // _SAMPLE_PLACES for index in range(_SAMPLE_PLACES)]
    places, begin = [], 0
    for share in shares:
        starts = [share.start + offset - begin for offset in offsets]
        inside = [share._replace(start=start) for start in starts if share.start <= start < share.stop]
        places += inside if share.source.form is Form.LINES else [share] * bool(inside)
        begin += share.stop - share.start
    return places


def _state_of(source: Source) -> os.stat_result:
    try:
        return os.stat(source.path)
    except OSError as error:
        raise UserError(f"can't read {source.path} ({error.strerror})") from error


def _described(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns]


# Settings in which the jobs of one corpus may differ. Each node may have its own copy of the input, and the last two
# change no complete shard.
_OF_ONE_SHARD = ("--shard", "--output-prefix", "input files", "--on-error", "--audit")


def _shard_of(settings: dict[str, Any], sources: list[Source]) -> str:
    """`Manifest.shard_of`."""
    same = {name: value for name, value in settings.items() if name not in _OF_ONE_SHARD}
    files = [[os.path.basename(source.path), source.bytes] for source in sources]
    return hashlib.sha256(json.dumps([same, files]).encode()).hexdigest()


def _settings(arguments: argparse.Namespace, tokenizer: JobTokenizer) -> dict[str, Any]:
    """Return everything that determines the job's bytes, under names that a user knows."""
    names = (
        *("json_keys", "append_eod", "language", "language_key", "spans_key", "detect_language", "original_languages"),
        *("expanded_languages", "min_confidence", "undetected", "audit", "dataset", "max_samples", "validation_share"),
        *("seed", "num_shards", "shard", "on_error", "output_prefix"),
    )
    settings = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    settings["tokenizer"] = [tokenizer.record.fingerprint, tokenizer.record.eod_id, tokenizer.record.special_tokens]
    return settings
