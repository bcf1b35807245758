"""A job at work: encodes its input, writes the corpora, and saves where to resume."""

import io
import json
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tqdm import tqdm

from data_tools.corpus.corpus_writer import CorpusWriter, Position, commit_corpus
from data_tools.corpus.tokenized import Documents
from data_tools.preprocessing.batches import Batch, ReadCursor
from data_tools.preprocessing.encode import PROBLEMS_SHOWN, Tally
from data_tools.preprocessing.job_spec import JobSpec
from data_tools.preprocessing.workers import worker_pool
from moelpr.base.errors import MachineError, UserError
from moelpr.base.files import empty, locked_folder
from moelpr.base.journal import Journal
from moelpr.data.manifest import Manifest
from moelpr.data.manifest import Source as ManifestSource

# A resumed job repeats what the interrupted one did after it last saved.
SAVE_EVERY_S = 30.0
_SKIPPED = "skipped.txt"


@dataclass
class State:
    """How far a job is; everything before it is on disk when it is saved."""

    tally: Tally = field(default_factory=Tally)
    positions: dict[str, Position] = field(default_factory=dict)  # how much of each corpus is written
    cursor: ReadCursor = ReadCursor()  # where to resume reading
    file_bytes: int = 0  # bytes of the input files that have been read
    skipped_bytes: int = 0  # size of the list of skipped lines
    text_bytes: dict[str, int] = field(default_factory=dict)  # sizes of the held-out texts, by the corpus's name
    # once they exist, only names of files are left to change
    manifests: dict[str, Manifest] = field(default_factory=dict)


class Lines:
    """A file to which a job adds lines, kept up to what its state has saved.

    Attributes:
        num_bytes: Its size.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self.num_bytes = path, num_bytes
        self._file = open(path, "ab")
        if self._file.tell() > num_bytes:
            self._file.truncate(num_bytes)

    def add(self, lines: bytes) -> None:
        self.num_bytes += self._file.write(lines)

    def flush(self) -> int:
        """Write everything to disk and return how much that is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.num_bytes

    def close(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()

    def rename(self, path: Path) -> None:
        self._file.close()
        if self._path.stat().st_size == self.num_bytes:  # otherwise an interrupted job has renamed it
            os.replace(self._path, path)


class Progress(tqdm):
    """Reports documents, MB/s, tokens/s and the time left: as a bar on a terminal, else as log lines.

    Args:
        total_bytes: Size of the input files; 0: unknown.
        done_bytes: Part of them that an interrupted job has read.
        log_interval: Number of documents between log lines.
    """

    def __init__(self, total_bytes: int, done_bytes: int, log_interval: int) -> None:
        self._log_interval, self._is_terminal = log_interval, sys.stderr.isatty()
        self._documents = self._tokens = 0
        where = {} if self._is_terminal else {"file": io.StringIO(), "mininterval": math.inf}
        super().__init__(total=total_bytes or None, initial=done_bytes, unit="B", unit_scale=True, leave=False, **where)

    def advance(self, batch: Batch, documents: dict[str, Documents]) -> None:
        """Count a batch and its documents."""
        lines_before = self._documents // self._log_interval
        self._documents += sum(len(group.lengths) for group in documents.values())
        self._tokens += sum(len(group.tokens) for group in documents.values())
        speed = self._tokens / max(self.format_dict["elapsed"], 1e-9)
        self.set_postfix_str(f"{self._documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
        self.update(batch.file_bytes if self.total else batch.num_bytes)
        if not self._is_terminal and self._documents // self._log_interval > lines_before:
            print(self, file=sys.stderr, flush=True)


class Job:
    """A job and the folder of its unfinished files, which it locks. Used as a context manager, it removes the folder in
    the end unless the job was interrupted, or failed and can be resumed.

    Unlike `resumable_directory`, which renames a folder, it renames files, and keeps what is behind the last position
    in its journal out of them.

    With --resume, it continues with what is in the folder, and keeps it if it fails.

    Raises:
        UserError: Another job is writing there, or the job to resume had other settings.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec, resume = spec, spec.args.resume
        self._folder = spec.outputs.unfinished_folder
        self._lock = ExitStack()
        self._lock.enter_context(locked_folder(self._folder, spec.outputs.prefix))
        if resume and (change := self._change()) and not spec.args.overwrite:
            raise UserError(
                f"the unfinished job in {self._folder} was started with different {change}; pass the same, or "
                "remove --resume or that folder to start from scratch"
            )
        if not resume or change:
            empty(self._folder)
        self._journal = Journal(self._folder, spec.settings)
        self.state = self._journal.last(State) or State()
        if self.state.file_bytes:
            print(f"note: resuming after {self.state.file_bytes:,} bytes of the input", file=sys.stderr)
        self._skipped = Lines(self._folder / _SKIPPED, self.state.skipped_bytes)
        self._texts = {
            name: Lines(self._folder / path.name, self.state.text_bytes.get(name, 0))
            for name, path in spec.outputs.texts.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for lines in (self._skipped, *self._texts.values()):
            lines.close()
        is_interrupted = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit, MachineError))
        if kind is None or not (self.spec.args.resume or is_interrupted):
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def write(self) -> None:
        """Encode and write the rest of the input, under temporary names."""
        spec, args, state = self.spec, self.spec.args, self.state
        if state.manifests:
            return
        reader = spec.inputs.reader()
        with ExitStack() as stack:
            encode = stack.enter_context(worker_pool(spec.encoder.encode, args.workers))
            has_conversations = spec.encoder.parser.chat is not None
            settings = spec.encoder.vocab_size, args.overwrite or args.resume, self._folder
            writers = {
                name: stack.enter_context(CorpusWriter(prefix, *settings, state.positions.get(name), has_conversations))
                for name, prefix in spec.outputs.corpora.items()
            }
            num_bytes = sum(share.stop - share.start for share in spec.inputs.shares)
            progress = stack.enter_context(Progress(num_bytes, state.file_bytes, args.log_interval))
            saved = time.monotonic()
            for batch, (documents, tally) in encode(reader.batches(state.cursor)):
                self._write_batch(batch, documents, tally, writers)
                progress.advance(batch, documents)
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    state.positions = {name: writer.flush() for name, writer in writers.items()}
                    self.save()
                    saved = time.monotonic()
            spec.inputs.check_unchanged()
            self._check_result(writers)
            state.manifests = {name: self._manifest(name, writer) for name, writer in writers.items()}
            self.save()

    def save(self) -> None:
        """Save what is needed to resume from here; everything written up to here must be on disk."""
        self.state.skipped_bytes = self._skipped.flush()
        self.state.text_bytes = {name: lines.flush() for name, lines in self._texts.items()}
        self._journal.add(self.state)

    def commit(self) -> None:
        """Rename the files. Can be repeated if it is interrupted."""
        for name, lines in self._texts.items():
            lines.rename(self.spec.outputs.texts[name])
        for name, manifest in self.state.manifests.items():
            commit_corpus(self.spec.outputs.corpora[name], self._folder, manifest)
        if self.state.skipped_bytes == 0:
            self.spec.outputs.skipped_path.unlink(missing_ok=True)  # an older list
        else:
            self._skipped.rename(self.spec.outputs.skipped_path)

    def _change(self) -> str:
        """The difference from the job that was interrupted here; "" if nothing does, or none was."""
        recorded = Journal.job_in(self._folder)
        settings = json.loads(json.dumps(self.spec.settings))
        for name in settings.keys() | recorded.keys() if recorded else ():
            if (before := recorded.get(name)) != (now := settings.get(name)):
                # The file that differs, among many.
                pairs = zip(before, now, strict=False) if name == "input files" else ()
                return name + next((f" ({new[0]})" for old, new in pairs if old != new), "")
        return ""

    def _write_batch(
        self, batch: Batch, documents: dict[str, Documents], tally: Tally, writers: dict[str, CorpusWriter]
    ) -> None:
        for name, group in documents.items():
            writers[name].add(group)
            if name in self._texts:
                self._texts[name].add(group.json_lines)
        self.state.tally.add(tally)
        del self.state.tally.problems[PROBLEMS_SHOWN:]
        self._skipped.add("".join(f"{problem}\n" for problem in tally.problems).encode(errors="backslashreplace"))
        self.state.cursor = batch.after
        self.state.file_bytes += batch.file_bytes

    def _check_result(self, writers: dict[str, CorpusWriter]) -> None:
        """Raise `UserError` if too many lines are malformed, or a corpus lacks tokens or a language."""
        tally = self.state.tally
        empty = [writer for writer in writers.values() if self.spec.shard_of is None and writer.at.tokens == 0]
        if len(empty) == len(writers):
            sources = [source.path for source in self.spec.inputs.sources]
            raise UserError(f"{_why_empty(sources, tally, self.spec.tokenizer.model)}; nothing was written")
        if tally.num_skipped > (max_bad_share := self.spec.args.max_bad_share) * tally.num_read:
            raise UserError(
                f"{tally.num_skipped:,} of {tally.num_read:,} lines are malformed, more than --max-bad-share "
                f"{max_bad_share:g} (first: {tally.problems[0]}); nothing was written"
            )
        if empty:
            raise UserError(
                f"{empty[0].prefix} would contain no text, so nothing was written; check --json-keys and "
                "--validation-share"
            )
        languages = {language for corpus in tally.corpora.values() for language in corpus.languages}
        if missing := self.spec.needed_languages - languages:
            raise UserError(
                f"no document has the language {', '.join(sorted(missing))} of --original-languages; found: "
                f"{', '.join(sorted(languages))}; correct the name or remove it; nothing was written"
            )

    def _manifest(self, name: str, writer: CorpusWriter) -> Manifest:
        files = writer.finalize()
        tally = self.state.tally.corpus(name)
        sources = {source.path: source for source in self.spec.inputs.sources}
        read = [(sources[path], documents) for path, documents in tally.sources.items()]
        return Manifest(
            tokenizer=self.spec.tokenizer,
            append_eod=self.spec.encoder.eod_id is not None,
            sources=[ManifestSource(one.path, one.bytes or None, one.sha1, count, one.version) for one, count in read],
            languages=dict(sorted(tally.languages.items())),
            documents=writer.at.documents,
            tokens=writer.at.tokens,
            skipped_lines=self.state.tally.num_skipped + self.state.tally.num_long,
            filter=self.spec.args.filter or None,
            filtered_documents=self.state.tally.num_filtered,
            files=files,
            shard_of=self.spec.shard_of,
        )


def _why_empty(sources: list[str], tally: Tally, tokenizer_model: str) -> str:
    """Return why the input gives no tokens."""
    label = ", ".join(sources[:5]) + (f" and {len(sources) - 5:,} more" if len(sources) > 5 else "")
    documents = sum(sum(corpus.sources.values()) for corpus in tally.corpora.values())
    if any(count.bytes for corpus in tally.corpora.values() for count in corpus.languages.values()):
        return (
            f"--tokenizer-model {tokenizer_model} produced no tokens for any of the {documents:,} documents of {label}"
            "; check that this tokenizer covers their language"
        )
    if tally.problems:
        number = tally.num_skipped + tally.num_long
        return f"{label} contains no usable document, {number:,} lines were skipped (first: {tally.problems[0]})"
    if tally.num_filtered and not documents:
        return f"--filter drops all {tally.num_filtered:,} documents of {label}; check its keys and values"
    return f"{label} contains {f'{documents:,} documents without any text' if documents else 'no documents'}"
