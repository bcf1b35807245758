"""From the command line to the description of a job: its inputs, its outputs, its tokenizer and its languages."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.corpus.corpus import shard_prefix
from data_tools.corpus.corpus_writer import check_output
from data_tools.preprocessing.conversations import load_chat_template
from data_tools.preprocessing.encode import VALIDATION, Encoder
from data_tools.preprocessing.inputs import Inputs
from data_tools.preprocessing.job_tokenizer import tokenizer_of
from data_tools.preprocessing.parsing import DocumentParser, RandomShare
from data_tools.preprocessing.registry import Dataset, read_registry
from data_tools.preprocessing.settings import GROUPS, KEPT, Settings
from data_tools.preprocessing.tagging import (
    DetectedLanguages,
    LanguageGroups,
    LanguageKey,
    LanguageSpans,
    OneLanguage,
    Tagger,
)
from data_tools.preprocessing.workers import load_in_process
from moelpr.base.errors import UserError
from moelpr.base.files import refuse_existing
from moelpr.base.languages import canonical
from moelpr.data.manifest import TokenizerRecord
from moelpr.data.text.filters import Filter
from moelpr.data.text.held_out_text import text_paths
from moelpr.data.text.language_id import UNDETECTED, Detector
from moelpr.data.text.sources import Form, Source, find_files, open_source
from moelpr.data.tokenizers.gigatoken import load_gigatoken

# Flags that determine the output's bytes, and names of other settings that do.
_SETTINGS = (
    "json_keys append_eod language language_key spans_key detect_language original_languages expanded_languages "
    "min_confidence undetected audit dataset max_samples validation_share seed num_shards shard on_error output_prefix"
).split()
# Settings in which the jobs of one corpus may differ. Each node may have its own copy of the input, and the last two
# change no complete shard.
_OF_ONE_SHARD = ("--shard", "--output-prefix", "input files", "--on-error", "--audit")


@dataclass(frozen=True)
class Outputs:
    """The files of a job."""

    prefix: str  # prefix of all of them, including the job's shard
    corpora: dict[str, str]  # corpus prefixes by the corpus's name within the job
    texts: dict[str, Path]  # the JSON lines of its held-out corpora, by the same names

    @property
    def skipped_path(self) -> Path:
        """The list of skipped lines."""
        return Path(f"{self.prefix}.skipped.txt")

    @property
    def unfinished_folder(self) -> Path:
        """The folder of the job's files until they are complete."""
        path = Path(self.prefix)
        return path.with_name(f".{path.name}.unfinished")


@dataclass(frozen=True)
class JobSpec:
    """A description of a job, after all checks that are possible before the work starts."""

    args: Settings  # the flags
    inputs: Inputs
    outputs: Outputs
    tokenizer: TokenizerRecord  # the record of the tokenizer
    encoder: Encoder
    settings: dict[str, Any]  # everything that determines the output's bytes, by flag
    # a hash of what all shards of a corpus have in common; None if the job writes a complete corpus
    shard_of: str | None
    # original languages that must occur: after a typo, their documents would be tagged expanded, unless all expanded
    # languages are named. A shard may lack some
    needed_languages: frozenset[str]
    notes: list[str]  # messages for the user


def describe_job(args: Settings) -> JobSpec:
    """Check the inputs and outputs of a job, and load its tokenizer."""
    outputs = _outputs(args)
    datasets = _datasets(args)
    keys = [args.json_keys if args.input else [dataset.key] for dataset in datasets]
    groups, tagger = _languages(args, datasets)
    condition = Filter(args.filter) if args.filter else None
    chat = None
    if args.conversations:
        source = args.chat_template_from or args.tokenizer_model
        chat = load_in_process(load_chat_template, source, args.tokenizer_model)
    tokenizer = tokenizer_of(args, args.append_eod)
    if chat is not None:
        chat.check_tokens(tokenizer.tokenizer, args.tokenizer_model)
        tokenizer = tokenizer._replace(prefix=[], suffix=[])  # the template has them
    encoder = Encoder(
        tokenizer=tokenizer.tokenizer,
        vocab_size=tokenizer.record.vocab_size,
        prefix=tokenizer.prefix,
        suffix=tokenizer.suffix,
        eod_id=tokenizer.record.eod_id if args.append_eod else None,
        parser=DocumentParser(tagger, keys, chat, condition),
        groups=groups,
        corpora=args.json_keys,
        skips_bad_lines=args.on_error == "skip",
        skips_undetected=args.undetected == "skip",
        validation=RandomShare(args.validation_share, args.seed),
        auditor=_detector(args, groups) if args.audit else None,
        max_tokens=args.max_tokens,
    )
    inputs = Inputs(datasets, encoder.parser, args.shard or 0, args.num_shards, args.max_samples, args.seed)
    read = {os.path.realpath(source.path) for source in inputs.sources}
    if both := [path for path in outputs.texts.values() if os.path.realpath(path) in read]:
        raise UserError(f"{both[0]} is an input, and held-out text would be written there; choose another name")
    if args.on_error != "skip":
        inputs.check_first_documents()
    notes = inputs.notes
    if args.tokenizer_backend != "reference" and chat is None:
        is_required = args.tokenizer_backend == "gigatoken"
        encoder.fast, reason = load_gigatoken(tokenizer.tokenizer, inputs.sample_texts(), is_required)
        notes += [f"tokenizing with {tokenizer.tokenizer.name}, not gigatoken: {reason}"] if reason else []
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _SETTINGS}
    record = tokenizer.record
    settings["tokenizer"] = [record.fingerprint, record.eod_id, record.special_tokens]
    settings["input files"] = inputs.described()
    if chat is not None:
        settings["conversations"] = [chat.fingerprint, args.max_tokens]
    if args.filter:
        settings["--filter"] = args.filter
    if args.language_key or args.spans_key:
        settings["language codes"] = "canonical"  # earlier versions took them as they are
    if any(source.form is Form.PARQUET for source in inputs.sources):
        settings["Parquet"] = "by row groups"  # in earlier versions a file belonged to one shard
    if outputs.texts:
        settings["held-out text"] = sorted(outputs.texts)
    if args.dataset:
        settings["entries of --dataset-info"] = [[dataset.name, dataset.bit, dataset.key] for dataset in datasets]
    is_shard = args.num_shards > 1
    shard_of = _shard_of(settings, inputs.sources) if is_shard else None
    is_certain = args.expanded_languages or args.language or is_shard
    needed = LanguageGroups.from_names(None if is_certain else args.original_languages, None).original
    return JobSpec(args, inputs, outputs, record, encoder, settings, shard_of, needed, notes)


def _outputs(args: Settings) -> Outputs:
    def sharded(prefix: str) -> str:
        return prefix if args.num_shards == 1 else shard_prefix(prefix, args.shard or 0, args.num_shards)

    prefix, keys = args.output_prefix, args.json_keys
    corpora = {key: f"{prefix}_{key}_document" for key in keys}
    if args.validation_share:
        corpora |= {f"{key} {VALIDATION}": f"{prefix}_{VALIDATION}_{key}_document" for key in keys}
    if slashed := [key for key in keys if "/" in key]:
        raise UserError(f"--json-keys {slashed[0]} would be part of the names of files; rename the key, without /")
    if len(set(corpora.values())) < len(corpora):
        raise UserError(f"--json-keys {' '.join(keys)} give two corpora one name; rename a key")
    corpora = {name: sharded(path) for name, path in corpora.items()}
    texts = {name: text_paths(path)[len(keys) == 1] for name, path in corpora.items() if name not in keys}
    outputs = Outputs(sharded(prefix), corpora, texts)
    overwrite = args.overwrite or (args.resume and os.path.exists(outputs.unfinished_folder))
    check_output(prefix, overwrite=True)  # it has a name
    for path in corpora.values():
        check_output(path, overwrite)
    refuse_existing([*texts.values()], overwrite)
    return outputs


def _datasets(args: Settings) -> list[Dataset]:
    if not args.dataset or args.dataset_info is None:
        sources = [open_source(path) for path in find_files(args.input)]
        bit: Any = "original" if args.language == KEPT else args.language if args.language in GROUPS else None
        return [Dataset("", sources, bit, args.json_keys[0])]
    names = [name.strip() for name in args.dataset.split(",") if name.strip()]
    return read_registry(args.dataset_info, names, args.dataset_dir)


def _languages(args: Settings, datasets: list[Dataset]) -> tuple[LanguageGroups, Tagger]:
    if args.dataset or args.language in GROUPS:
        pairs = [(dataset.name or args.language or "", dataset.bit) for dataset in datasets]
        original, expanded = (frozenset(n for n, bit in pairs if bit == group) for group in ("original", "expanded"))
        unwanted = LanguageGroups.from_names(None, args.expanded_languages).expanded  # in kept text
        return LanguageGroups(original, expanded | unwanted), OneLanguage([name for name, _ in pairs])
    groups = LanguageGroups.from_names(args.original_languages, args.expanded_languages)
    if args.language:
        language = canonical(args.language)
        if language not in groups.original | groups.expanded and (groups.expanded or not groups.original):
            raise UserError(
                f"--language {args.language} is neither in --original-languages nor in --expanded-languages; add it "
                "to one of them"
            )
        return groups, OneLanguage([language])
    if args.language_key:
        return groups, LanguageKey(args.language_key, groups)
    if args.spans_key:
        return groups, LanguageSpans(args.spans_key, groups)
    detector = _detector(args, groups)
    if args.undetected == "original":
        groups = LanguageGroups(groups.original | {UNDETECTED}, groups.expanded)
    return groups, DetectedLanguages(detector, args.detect_language == "line")


def _detector(args: Settings, groups: LanguageGroups) -> Detector:
    """Return a detector of the named languages, or of any language unless all are named."""
    is_complete = groups.expanded and not args.dataset and not args.language
    return Detector(groups.original | groups.expanded if is_complete else frozenset(), args.min_confidence)


def _shard_of(settings: dict[str, Any], sources: list[Source]) -> str:
    same = {name: value for name, value in settings.items() if name not in _OF_ONE_SHARD}
    files = [[os.path.basename(source.path), source.bytes] for source in sources]
    return hashlib.sha256(json.dumps([same, files]).encode()).hexdigest()
