"""From flags to what a job does: its files, its tokenizer and how documents get their languages."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import CorpusPaths, shard_prefix
from data_tools.preprocessing.backends import choose_backend
from data_tools.preprocessing.detection import DetectedLanguages, Detector
from data_tools.preprocessing.encoder import VALIDATION, Encoder
from data_tools.preprocessing.journal import unfinished_folder
from data_tools.preprocessing.languages import UNDETECTED, Bits, LanguageKey, LanguageSpans, OneLanguage, Tagger
from data_tools.preprocessing.readers import Place, Reader
from data_tools.preprocessing.registry import Dataset, read_registry, verify_checksum
from data_tools.preprocessing.sampling import draw_documents
from data_tools.preprocessing.sources import Form, Share, Source, find_files, open_source, shares_of
from data_tools.preprocessing.tokenizing import JobTokenizer, load_job_tokenizer
from moelpr.documents import BadLine
from moelpr.errors import UserError
from moelpr.files import refuse_existing

_SAMPLE_PLACES = 16
_SAMPLE_CHARACTERS = 1 << 15  # of each


@dataclass
class Plan:
    """What a job does.

    Attributes:
        output_prefix: the job's own, with its shard.
        prefixes: by the corpus's name within the job.
        sources: all input files.
        shares: this job's part of them.
        chosen: per share the documents that were drawn; None: all.
        columns: per dataset the keys that are read.
        settings: all that decides the job's bytes.
        notes: sentences for the user.
        needs_text: a corpus without a token is a mistake; a shard may be one.
    """

    output_prefix: str
    prefixes: dict[str, str]
    sources: list[Source]
    shares: list[Share]
    chosen: list[NDArray[np.int64]] | None
    columns: list[list[str]]
    tokenizer: JobTokenizer
    encoder: Encoder
    settings: dict[str, Any]
    notes: list[str]
    needs_text: bool

    @property
    def skipped_path(self) -> Path:
        """Where broken lines are listed."""
        return Path(f"{self.output_prefix}.skipped.txt")


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Find out all that can be known before the work starts.

    Raises:
        UserError: an input or the tokenizer can't be used, or the output is there already.
    """
    prefixes, output_prefix = _prefixes(arguments), _output_prefix(arguments)
    if not (arguments.resume and unfinished_folder(output_prefix).exists()):
        refuse_existing([path for prefix in prefixes.values() for path in CorpusPaths.of(prefix)], arguments.overwrite)
    datasets = _datasets(arguments)
    sources = [source for dataset in datasets for source in dataset.sources]
    notes = [f"{source.path} is empty" for source in sources if source.bytes == 0 and source.form is not Form.STREAM]
    shares = list(shares_of(sources, arguments.shard or 0, arguments.num_shards))
    keys = [arguments.json_keys if arguments.input else [dataset.key] for dataset in datasets]
    tokenizer = _tokenizer(arguments)
    encoder = _encoder(arguments, datasets, keys, tokenizer)
    for share in shares:
        if share.source.sha1:
            verify_checksum(share.source)
    chosen = None
    if arguments.max_samples is not None:
        names = [dataset.name for dataset in datasets]
        chosen, drawn = draw_documents(shares, names, arguments.max_samples, arguments.seed)
        notes += drawn
    tagger_keys = encoder.tagger.columns()
    columns = [list(dict.fromkeys([*([] if arguments.spans_key else own), *tagger_keys])) for own in keys]
    if arguments.tokenizer_backend != "reference":
        sample = _sample(shares, columns, encoder)
        encoder.backend, reason = choose_backend(
            encoder.backend, tokenizer.source, sample, is_wanted=arguments.tokenizer_backend == "gigatoken"
        )
        if reason:
            notes.append(f"tokenizing with {encoder.backend.name}, not gigatoken: {reason}")
    return Plan(
        output_prefix=output_prefix,
        prefixes=prefixes,
        sources=sources,
        shares=shares,
        chosen=chosen,
        columns=columns,
        tokenizer=tokenizer,
        encoder=encoder,
        settings=_settings(arguments, sources, tokenizer),
        notes=notes,
        needs_text=arguments.num_shards == 1,
    )


def _tokenizer(arguments: argparse.Namespace) -> JobTokenizer:
    tokenizer = load_job_tokenizer(
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        not arguments.tokenizer_hf_no_include_special_tokens,
        arguments.eod_token,
    )
    if arguments.append_eod and tokenizer.record.eod_id is None:
        raise UserError(
            f"--append-eod needs an end-of-document token, but {arguments.tokenizer_model} has none; name one with "
            f"--eod-token"
        )
    return tokenizer


def _encoder(
    arguments: argparse.Namespace, datasets: list[Dataset], keys: list[list[str]], tokenizer: JobTokenizer
) -> Encoder:
    bits, tagger = _languages(arguments, datasets)
    return Encoder(
        backend=tokenizer.reference(),
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


def _detector(arguments: argparse.Namespace, bits: Bits) -> Detector:
    """Detects any language, or where all are named one of these."""
    known = bits.original | bits.expanded if bits.expanded and not arguments.dataset else frozenset()
    return Detector(known if not arguments.language else frozenset(), arguments.min_confidence)


def _output_prefix(arguments: argparse.Namespace) -> str:
    if arguments.num_shards == 1:
        return str(arguments.output_prefix)
    return shard_prefix(arguments.output_prefix, arguments.shard, arguments.num_shards)


def _prefixes(arguments: argparse.Namespace) -> dict[str, str]:
    prefixes = {key: f"{arguments.output_prefix}_{key}_document" for key in arguments.json_keys}
    if arguments.validation_share:
        prefixes |= {
            f"{key} {VALIDATION}": f"{arguments.output_prefix}_{VALIDATION}_{key}_document"
            for key in arguments.json_keys
        }
    if arguments.num_shards > 1:
        prefixes = {
            key: shard_prefix(prefix, arguments.shard, arguments.num_shards) for key, prefix in prefixes.items()
        }
    return prefixes


def _datasets(arguments: argparse.Namespace) -> list[Dataset]:
    if arguments.dataset:
        names = [name.strip() for name in arguments.dataset.split(",") if name.strip()]
        return read_registry(arguments.dataset_info, names, arguments.dataset_dir)
    sources = [open_source(path) for path in find_files(arguments.input)]
    return [Dataset("", sources, arguments.language or "", arguments.json_keys[0])]


def _languages(arguments: argparse.Namespace, datasets: list[Dataset]) -> tuple[Bits, Tagger]:
    if arguments.dataset or arguments.language:
        names = [dataset.name or dataset.language for dataset in datasets]
        groups = [
            frozenset(name for name, dataset in zip(names, datasets, strict=True) if dataset.language == language)
            for language in ("original", "expanded")
        ]
        return Bits(*groups), OneLanguage(names)
    bits = Bits.from_names(arguments.original_languages, arguments.expanded_languages)
    if arguments.language_key:
        return bits, LanguageKey(arguments.language_key, bits)
    if arguments.spans_key:
        return bits, LanguageSpans(arguments.spans_key, bits)
    detector = _detector(arguments, bits)
    if arguments.undetected == "original":
        bits = Bits(bits.original | {UNDETECTED}, bits.expanded)
    return bits, DetectedLanguages(detector, arguments.detect_language == "line")


def _sample(shares: list[Share], columns: list[list[str]], encoder: Encoder) -> list[str]:
    """Some texts from all over the input, for comparing tokenizer libraries. Broken lines are told later."""
    texts: list[str] = []
    places = _spread([share for share in shares if share.source.form is not Form.STREAM])
    with TemporaryDirectory() as spool:
        reader = Reader(places, columns, None, Path(spool))
        for index in range(len(places)):
            batch = next(reader.batches(Place(index)), None)
            if batch is None or batch.is_long_line:
                continue
            characters = 0
            for item in batch.items():
                try:
                    found = encoder.texts(item, batch.share.source.dataset)
                except BadLine:
                    continue
                texts += [text.text[:_SAMPLE_CHARACTERS] for text in found]
                characters += sum(len(text.text) for text in found)
                if characters >= _SAMPLE_CHARACTERS:
                    break
    return texts


def _spread(shares: list[Share]) -> list[Share]:
    """Places to begin reading at, evenly over the shares' bytes; of an archive only its start can be had."""
    total = sum(share.stop - share.start for share in shares)
    offsets = [total * index // _SAMPLE_PLACES for index in range(_SAMPLE_PLACES)]
    places, begin = [], 0
    for share in shares:
        size = share.stop - share.start
        inside = [offset - begin for offset in offsets if begin <= offset < begin + size]
        if share.source.form is Form.LINES:
            places += [share._replace(start=share.start + offset) for offset in inside]
        elif inside:
            places.append(share)
        begin += size
    return places


def _settings(arguments: argparse.Namespace, sources: list[Source], tokenizer: JobTokenizer) -> dict[str, Any]:
    """All that decides the job's bytes, under names that a user knows."""
    names = (
        *("json_keys", "append_eod", "language", "language_key", "spans_key", "detect_language", "original_languages"),
        *("expanded_languages", "min_confidence", "undetected", "audit", "dataset", "max_samples", "validation_share"),
        *("seed", "num_shards", "shard", "on_error", "output_prefix"),
    )
    settings = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    settings["input files"] = [
        [os.path.abspath(source.path), source.bytes, os.stat(source.path).st_mtime_ns]
        if source.form is not Form.STREAM
        else source.path
        for source in sources
    ]
    settings["tokenizer"] = [tokenizer.record.fingerprint, tokenizer.record.eod_id, tokenizer.record.special_tokens]
    return settings
