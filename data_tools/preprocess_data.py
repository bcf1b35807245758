"""JSON lines to a tokenized corpus: <output-prefix>_<key>_document.bin and .idx for Megatron, .lang for us.

The flags are those of Megatron-LM's tool of the same name, plus the language bit. It is always stated: for all of the
input (--language original), or per document (--language-key lang --original-languages en,es,zh).

Several jobs share the work with --num-shards N, each with its own --shard; data_tools/merge_data.py joins what they
write into the bytes that one job would have written.
"""

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.corpus import CorpusPaths, shard_prefix
from data_tools.corpus_writer import CorpusWriter
from moelpr.data.tokenizer import Tokenizer, add_tokenizer_arguments, load_tokenizer
from moelpr.errors import UserError, run_command
from moelpr.files import refuse_existing

BATCH_BYTES = 1 << 18
PROBLEMS_SHOWN = 10


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    arguments = parse_arguments(argv)
    prefixes = {key: f"{arguments.output_prefix}_{key}_document" for key in arguments.json_keys}
    if arguments.num_shards > 1:
        prefixes = {
            key: shard_prefix(prefix, arguments.shard, arguments.num_shards) for key, prefix in prefixes.items()
        }
    shares = list(shard_of(arguments.input, arguments.shard or 0, arguments.num_shards))
    refuse_existing([path for prefix in prefixes.values() for path in CorpusPaths.of(prefix)], arguments.overwrite)
    tokenizer = load_tokenizer(
        arguments.tokenizer_type, arguments.tokenizer_model, not arguments.tokenizer_hf_no_include_special_tokens
    )
    if arguments.append_eod and tokenizer.eod_id is None:
        raise UserError(f"--append-eod needs an end-of-document token, but {arguments.tokenizer_model} has none")
    encoder = Encoder(
        tokenizer=tokenizer,
        json_keys=arguments.json_keys,
        append_eod=arguments.append_eod,
        languages=LanguageRule.from_arguments(arguments),
        skip_bad_lines=arguments.on_error == "skip",
    )

    with ExitStack() as stack:
        # The workers start before the writers: they encode while this process is still importing Megatron.
        batches = stack.enter_context(EncodingPool(encoder, arguments.workers)).encode(read_batches(shares))
        writers = {
            key: stack.enter_context(CorpusWriter(prefix, tokenizer.vocab_size, arguments.overwrite))
            for key, prefix in prefixes.items()
        }
        progress = stack.enter_context(
            Progress(sum(share.stop - share.start for share in shares), arguments.log_interval)
        )
        totals = Totals()
        for batch in batches:
            tokens = write_batch(batch, writers, totals)
            progress.advance(len(batch.languages), tokens, batch.num_bytes)
        for writer in writers.values():
            if writer.num_tokens == 0 and arguments.num_shards == 1:
                raise UserError(f"{no_text(arguments.input, totals)}; nothing was written")
            writer.finalize()
        for writer in writers.values():
            writer.commit()
    report(writers, totals, encoder.languages, time.monotonic() - started)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input and output")
    group.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines files, read in this order")
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of text, a corpus each (default: text)",
    )
    group.add_argument("--output-prefix", required=True, metavar="P", help="write P_<key>_document.bin, .idx and .lang")
    group.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")

    group = parser.add_argument_group("language bit (one of the first two)")
    way = group.add_mutually_exclusive_group(required=True)
    way.add_argument("--language", choices=("original", "expanded"), help="what all of the input is")
    way.add_argument("--language-key", metavar="KEY", help="key that holds a document's language")
    group.add_argument("--original-languages", metavar="A,B", help="values of --language-key that are original")
    group.add_argument(
        "--expanded-languages",
        metavar="C,D",
        help="values of --language-key that are expanded languages; any other is an error (default: all others are)",
    )

    group = parser.add_argument_group("running")
    cores = len(os.sched_getaffinity(0))
    group.add_argument("--workers", type=int, default=cores, help=f"processes (default: one per core, {cores} here)")
    group.add_argument("--num-shards", type=int, default=1, metavar="N", help="jobs that share the input (default: 1)")
    group.add_argument("--shard", type=int, metavar="I", help="which of the N this one is, from 0; its files end in it")
    group.add_argument(
        "--log-interval", type=int, default=10_000, help="documents between two lines of a log (default: 10000)"
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="on a bad line, stop or skip and count (default: stop)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)

    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        raise UserError(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    for flag in ("workers", "log_interval", "num_shards"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)} must be at least 1")
    if arguments.shard is None and arguments.num_shards > 1:
        raise UserError(f"--num-shards {arguments.num_shards} needs --shard, 0 to {arguments.num_shards - 1}")
    if arguments.shard is not None and not 0 <= arguments.shard < arguments.num_shards:
        raise UserError(f"--shard {arguments.shard} is none of the --num-shards {arguments.num_shards}, counted from 0")
    if arguments.language_key and not arguments.original_languages:
        raise UserError("--language-key needs --original-languages, such as --original-languages en,es,zh")
    if arguments.language and (arguments.original_languages or arguments.expanded_languages):
        raise UserError("--original-languages and --expanded-languages need --language-key; --language tags all")
    return arguments


@dataclass(frozen=True)
class LanguageRule:
    """Where a document's language bit comes from.

    Attributes:
        key: the JSON key that names the language; None: every document is `name`.
        name: "original" or "expanded" without a key.
        original: languages whose bit is 1.
        expanded: languages whose bit is 0; empty: all others.
    """

    key: str | None
    name: str
    original: frozenset[str]
    expanded: frozenset[str]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "LanguageRule":
        if arguments.language:
            return cls(None, arguments.language, frozenset({"original"}), frozenset({"expanded"}))
        original, expanded = (
            frozenset(name.strip() for name in (names or "").split(",") if name.strip())
            for names in (arguments.original_languages, arguments.expanded_languages)
        )
        if both := original & expanded:
            raise UserError(f"{', '.join(sorted(both))} can't be both an original and an expanded language")
        return cls(arguments.language_key, "", original, expanded)

    def language(self, document: dict[str, object]) -> str:
        if self.key is None:
            return self.name
        name = document.get(self.key)
        if not isinstance(name, str):
            found = f"holds {json.dumps(name)[:40]}, not a language" if self.key in document else "is missing"
            raise BadLine(f'the language key "{self.key}" {found}')
        if self.expanded and name not in self.original and name not in self.expanded:
            raise BadLine(f'the language "{name[:40]}" is neither in --original-languages nor in --expanded-languages')
        return name


class Share(NamedTuple):
    """The lines of one input file that begin in bytes [start, stop)."""

    path: str
    start: int
    stop: int


class LineBatch(NamedTuple):
    """Lines of one input file, as bytes without interpretation.

    first_line: counted from 1 where the share begins.
    """

    share: Share
    first_line: int
    lines: list[bytes]

    def line_number(self, number: int) -> int:
        """In the whole file, for a person; costs reading what lies before the share."""
        return number + lines_before(self.share.path, self.share.start)


@dataclass
class EncodedBatch:
    """A batch of documents, in the order of their lines.

    Attributes:
        num_bytes: bytes of the lines, skipped ones included.
        languages: each document's language.
        ids: for each JSON key the documents' token ids, one after another: [tokens].
        lengths: for each JSON key the documents' token counts: [documents].
        problems: a sentence per skipped line.
    """

    num_bytes: int
    languages: list[str] = field(default_factory=list)
    ids: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class BadLine(Exception):
    """Why a line can't be used; whoever knows the file and line number adds them."""


@dataclass
class Encoder:
    """Turns lines into token ids; lives in the workers."""

    tokenizer: Tokenizer
    json_keys: list[str]
    append_eod: bool
    languages: LanguageRule
    skip_bad_lines: bool

    def encode(self, batch: LineBatch) -> EncodedBatch:
        """Encode a batch.

        Raises:
            UserError: the first line that can't be used, unless bad lines are skipped.
        """
        encoded = EncodedBatch(num_bytes=sum(map(len, batch.lines)))
        texts: dict[str, list[str]] = {key: [] for key in self.json_keys}
        for number, line in enumerate(batch.lines, batch.first_line):
            if line.isspace():
                continue
            try:
                document = self.parse(line)
                language = self.languages.language(document)
                found = [self.text(document, key) for key in self.json_keys]
            except BadLine as error:
                problem = f"{batch.share.path}:{batch.line_number(number)}: {error}"
                if not self.skip_bad_lines:
                    raise UserError(f"{problem}; mend the line or pass --on-error skip") from None
                encoded.problems.append(problem)
                continue
            encoded.languages.append(language)
            for key, text in zip(self.json_keys, found, strict=True):
                texts[key].append(text)
        for key in self.json_keys:
            ids = self.tokenizer.encode_batch(texts[key])
            if self.append_eod:
                for document_ids in ids:
                    if document_ids:  # an empty document stays empty, as in Megatron
                        document_ids.append(self.tokenizer.eod_id)  # type: ignore[arg-type]  # main() has checked
            encoded.lengths[key] = [len(document_ids) for document_ids in ids]
            encoded.ids[key] = np.fromiter(chain.from_iterable(ids), np.int32, sum(encoded.lengths[key]))
        return encoded

    @staticmethod
    def parse(line: bytes) -> dict[str, object]:
        try:
            document = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadLine(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise BadLine(f"not JSON ({error.msg} at character {error.pos + 1})") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, brackets nested too deep
            raise BadLine(f"not usable JSON ({error})") from None
        if not isinstance(document, dict):
            raise BadLine(f"a JSON object was expected, found {json_type(document)}")
        return document

    @staticmethod
    def text(document: dict[str, object], key: str) -> str:
        if key not in document:
            raise BadLine(f'the key "{key}" is missing')
        text = document[key]
        if not isinstance(text, str):
            raise BadLine(f'the key "{key}" holds {json_type(text)}, not a string')
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # "\ud800" is good JSON and no character
                raise BadLine(f'the key "{key}" holds half a surrogate pair at character {error.start + 1}') from None
        return text


def json_type(value: object) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def input_bytes(path: str) -> int:
    """The size of an input file, which is opened once so that a mistake shows before the work starts."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"the input {path} can't be read ({error.strerror}); --input wants JSON lines files") from error


def shard_of(paths: list[str], shard: int, num_shards: int) -> Iterator[Share]:
    """A shard's shares, in order: an equal slice of the files' bytes one after another."""
    sizes = [input_bytes(path) for path in paths]
    first, last = (sum(sizes) * index // num_shards for index in (shard, shard + 1))
    begin = 0
    for path, size in zip(paths, sizes, strict=True):
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            yield Share(path, start, stop)
        begin += size


def read_batches(shares: list[Share]) -> Iterator[LineBatch]:
    """Lines in batches of about BATCH_BYTES, so that memory stays small and a batch is worth its way."""
    for share in shares:
        with open(share.path, "rb") as file:
            position = _first_line_at(file, share.start)
            batch, size, number = LineBatch(share, 1, []), 0, 0
            while position < share.stop and (line := file.readline()):
                number += 1
                position += len(line)
                batch.lines.append(line)
                size += len(line)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = LineBatch(share, number + 1, []), 0
            if batch.lines:
                yield batch


def _first_line_at(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at `start` or later; its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


@functools.cache
def lines_before(path: str, start: int) -> int:
    """Lines of a file that begin before byte `start`."""
    with open(path, "rb") as file:
        left = _first_line_at(file, start)
        file.seek(0)
        lines = 0
        while left and (piece := file.read(min(left, 1 << 20))):
            lines += piece.count(b"\n")
            left -= len(piece)
        return lines


# Set just before the workers are forked, so that they inherit a loaded tokenizer: no second import of transformers
# (2 s and 0.7 GB each), and a tokenizer that can't be loaded is told once, by the parent.
_encoder: Encoder | None = None


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores to use
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # A parent that is killed can't stop its workers; they would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()


def _encode(batch: LineBatch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode(batch)


class EncodingPool:
    """Worker processes that encode batches; results come in the batches' order, however many workers."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        global _encoder
        _encoder = encoder
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)

    def encode(self, batches: Iterator[LineBatch]) -> Iterator[EncodedBatch]:
        """Encoded batches; the first few are under way when this returns.

        Raises:
            UserError: a worker's, or a worker was killed.
        """
        pending: deque[Future[EncodedBatch]] = deque()
        with warnings.catch_warnings():
            # Python warns of forking beside threads. The only ones here belong to numpy and torch, which the workers
            # don't use.
            warnings.simplefilter("ignore", DeprecationWarning)
            for batch in batches:
                pending.append(self._pool.submit(_encode, batch))
                if len(pending) == 4 * self._workers:  # enough that no worker waits; a bound on memory
                    break
        return self._results(pending, batches)

    def _results(self, pending: deque[Future[EncodedBatch]], batches: Iterator[LineBatch]) -> Iterator[EncodedBatch]:
        try:
            while pending:
                result = pending.popleft().result()
                for batch in batches:
                    pending.append(self._pool.submit(_encode, batch))
                    break
                yield result
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for want of memory; pass fewer --workers"
            ) from error

    def __enter__(self) -> "EncodingPool":
        return self

    def __exit__(self, *_: object) -> None:
        global _encoder
        _encoder = None
        self._pool.shutdown(cancel_futures=True)


@dataclass
class Totals:
    """What the final report counts."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    num_empty: int = 0
    num_skipped: int = 0
    problems: list[str] = field(default_factory=list)


def write_batch(batch: EncodedBatch, writers: dict[str, CorpusWriter], totals: Totals) -> int:
    """Write a batch's documents to each key's corpus; returns the tokens written."""
    assert _encoder is not None
    original = _encoder.languages.original
    written = 0
    for key, writer in writers.items():
        start = 0
        for language, length in zip(batch.languages, batch.lengths[key], strict=True):
            writer.add_document(batch.ids[key][start : start + length], language in original)
            start += length
            totals.tokens[language] += length
            totals.num_empty += length == 0
        written += start
    totals.documents.update(batch.languages)
    totals.num_skipped += len(batch.problems)
    totals.problems += batch.problems[: PROBLEMS_SHOWN - len(totals.problems)]
    return written


class Progress:
    """Documents, MB/s and tokens/s: a bar on a terminal, else a line every `log_interval` documents."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._total_bytes = total_bytes
        self._log_interval = log_interval
        self._documents = self._tokens = self._bytes = 0
        self._started = time.monotonic()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False) if sys.stderr.isatty() else None

    def advance(self, documents: int, tokens: int, num_bytes: int) -> None:
        lines_before = self._documents // self._log_interval
        self._documents += documents
        self._tokens += tokens
        self._bytes += num_bytes
        tokens_per_s = self._tokens / max(time.monotonic() - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._documents:,} documents, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self._bar.update(num_bytes)
        elif self._documents // self._log_interval > lines_before:
            elapsed_s = time.monotonic() - self._started
            left_s = elapsed_s * (self._total_bytes - self._bytes) / max(self._bytes, 1)
            print(
                f"{self._bytes / max(self._total_bytes, 1):6.1%}  {self._documents:,} documents, "
                f"{self._bytes / 1e6 / max(elapsed_s, 1e-9):.1f} MB/s, {tokens_per_s:,.0f} tokens/s, "
                f"{left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def no_text(inputs: list[str], totals: Totals) -> str:
    """Why there is nothing to write."""
    names = ", ".join(inputs)
    if totals.num_skipped:
        return (
            f"{names} holds no usable document, {totals.num_skipped:,} lines were skipped (first: {totals.problems[0]})"
        )
    if not totals.documents:
        return f"{names} holds no documents"
    return f"{names} holds {totals.documents.total():,} documents without any text"


def report(writers: dict[str, CorpusWriter], totals: Totals, languages: LanguageRule, elapsed_s: float) -> None:
    """Say what was written, and what a reader would want to know about it."""
    for writer in writers.values():
        share = writer.num_original / max(writer.num_tokens, 1)  # a shard may be empty
        print(
            f"{Path(writer.prefix)}.bin, .idx, .lang: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
            f"({share:.1%} original-language), {np.dtype(writer.dtype).name}"
        )
    if languages.key is not None:
        print(f"\n  {'language':<16}{'bit':<12}{'documents':>12}{'tokens':>16}")
        for name, documents in totals.documents.most_common():
            bit = "original" if name in languages.original else "expanded"
            print(f"  {name:<16}{bit:<12}{documents:>12,}{totals.tokens[name]:>16,}")
        print()
        for name in sorted(languages.original | languages.expanded):
            if name not in totals.documents:
                print(f"note: no document is tagged {name}")
    if totals.num_empty:
        print(f"note: {totals.num_empty:,} documents are empty and hold no tokens")
    if totals.num_skipped:
        print(f"warning: {totals.num_skipped:,} lines were skipped:", file=sys.stderr)
        for problem in totals.problems:
            print(f"  {problem}", file=sys.stderr)
        if totals.num_skipped > len(totals.problems):
            print(f"  and {totals.num_skipped - len(totals.problems):,} more", file=sys.stderr)
    print(f"done in {elapsed_s:.1f} s")


if __name__ == "__main__":
    run_command(main)
