"""A job at work: encodes its input, writes the corpora, and saves where to resume."""

import io
import json
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from data_tools.corpus_writer import CorpusWriter, Documents, Position, commit_corpus, make_folder
from data_tools.preprocessing.encode import EncodingPool
from data_tools.preprocessing.inputs import Batch, ReadCursor, Reader
from data_tools.preprocessing.plan import Plan
from data_tools.preprocessing.summary import Tally, why_empty
from moelpr.data.manifest import Manifest
from moelpr.data.manifest import Source as ManifestSource
from moelpr.errors import UserError
from moelpr.files import LOCK_FILE, atomic_file, empty, locked

# A resumed job repeats what the interrupted one did after it last saved.
SAVE_EVERY_S = 30.0
_STATE = "state.json"
_SKIPPED = "skipped.txt"


class Journal:
    """The folder of an unfinished job, locked while the job runs. Used as a context manager, it removes the folder in
    the end unless the job failed and can be resumed.

    Not `moelpr.files.resumable_directory`: a job's files get several names in a folder that contains others, and are
    valid only up to the positions that were saved together with its counts.

    Args:
        plan: what the job does; a resumed job must have the same settings.
        resume: continue with what is there, and keep the folder if the job fails.

    Attributes:
        folder: folder for unfinished files.
        spool: folder for files that are needed only while this process runs.
        state: what was saved last; None: the job starts from the beginning.

    Raises:
        UserError: Another job is writing there, or the job to resume had other settings.
    """

    def __init__(self, plan: Plan, resume: bool) -> None:
        self.folder = folder = plan.unfinished_folder
        make_folder(folder)
        self._lock = ExitStack()
        self._lock.enter_context(locked(folder / LOCK_FILE, plan.output_prefix))
        self._settings: dict[str, Any] = json.loads(json.dumps(plan.settings))
        self._keep = resume
        self.state: dict[str, Any] | None = self._read() if resume else None
        if self.state is None:
            empty(folder)
        self.spool = folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir()
        self._skipped_bytes = 0 if self.state is None else self.state["skipped_bytes"]
        self._skipped = open(folder / _SKIPPED, "ab")
        if (folder / _SKIPPED).stat().st_size > self._skipped_bytes:
            self._skipped.truncate(self._skipped_bytes)

    def add_problems(self, problems: list[str]) -> None:
        """List skipped lines."""
        text = "".join(f"{problem}\n" for problem in problems).encode(errors="backslashreplace")
        self._skipped.write(text)
        self._skipped_bytes += len(text)

    def save(self, state: dict[str, Any]) -> None:
        """Save what is needed to resume from here; everything written up to here must be on disk."""
        self._skipped.flush()
        os.fsync(self._skipped.fileno())
        self.state = {**state, "settings": self._settings, "skipped_bytes": self._skipped_bytes}
        with atomic_file(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps(self.state), "utf-8")

    def keep_problems(self, path: Path) -> None:
        """Rename the list of skipped lines to `path`; if there are none, remove an older list."""
        self._skipped.close()
        unfinished = self.folder / _SKIPPED
        if self._skipped_bytes == 0:
            path.unlink(missing_ok=True)
        elif unfinished.stat().st_size:  # otherwise an interrupted job has renamed it
            os.replace(unfinished, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._skipped.close()
        if kind is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        try:
            state: dict[str, Any] = json.loads(path.read_bytes())
            found = state["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, so the job can't be resumed; remove --resume") from error
        for name in self._settings.keys() | found.keys():
            if found.get(name) != self._settings.get(name):
                raise UserError(
                    f"the unfinished job in {self.folder} was started with different {name}; pass the same, or remove "
                    "--resume to start from scratch"
                )
        return state


class Progress:
    """Reports documents, MB/s, tokens/s and the time left: as a bar on a terminal, else as log lines.

    Args:
        total_bytes: size of the input files; 0: unknown.
        done_bytes: part of them that an interrupted job has read.
        log_interval: number of documents between log lines.
    """

    def __init__(self, total_bytes: int, done_bytes: int, log_interval: int) -> None:
        self._log_interval = log_interval
        self._documents = self._tokens = 0
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        where = {} if self._is_terminal else {"file": io.StringIO(), "mininterval": math.inf}
        self._bar = tqdm(total=total_bytes or None, initial=done_bytes, unit="B", unit_scale=True, leave=False, **where)

    def advance(self, batch: Batch, documents: dict[str, Documents]) -> None:
        """Count a batch and its documents."""
        lines_before = self._documents // self._log_interval
        self._documents += sum(len(group.lengths) for group in documents.values())
        self._tokens += sum(len(group.tokens) for group in documents.values())
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{self._documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(batch.file_bytes if self._bar.total else batch.num_bytes)
        if not self._is_terminal and self._documents // self._log_interval > lines_before:
            print(self._bar, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class Job:
    """A job and how far it is.

    Args:
        plan: what to do.
        journal: where to save it, and the state of an interrupted job to resume.
    """

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self.plan = plan
        self._journal = journal
        self.tally = Tally()
        self._positions: dict[str, Position] = {}  # of the corpora when the job was last saved
        self._cursor = ReadCursor()  # everything before it is written
        self._file_bytes = 0  # of the input files
        self.manifests: dict[str, Manifest] = {}  # once they exist, only the files' names are left to change
        if (state := journal.state) is not None:
            print(f"note: resuming after {state['file_bytes']:,} bytes of the input", file=sys.stderr)
            self.tally = Tally.from_json(state["tally"])
            self._positions = {name: Position(*position) for name, position in state["positions"].items()}
            self._cursor, self._file_bytes = ReadCursor(*state["place"]), state["file_bytes"]
            self.manifests = {name: Manifest.from_json(content) for name, content in state["manifests"].items()}

    def write(self, workers: int, log_interval: int, overwrite: bool, max_bad_share: float) -> None:
        """Encode and write the rest of the input, under temporary names.

        Raises:
            UserError: The input can't be used, or gives no useful corpus.
        """
        if self.manifests:
            return
        plan, folder, spool = self.plan, self._journal.folder, self._journal.spool
        reader = Reader(plan.shares, plan.columns, plan.chosen, spool)
        total_bytes = sum(share.stop - share.start for share in plan.shares)
        with ExitStack() as stack:
            pool = stack.enter_context(EncodingPool(plan.encoder, workers, spool))
            writers = {
                name: stack.enter_context(
                    CorpusWriter(prefix, plan.encoder.vocab_size, overwrite, folder, self._positions.get(name))
                )
                for name, prefix in plan.prefixes.items()
            }
            progress = Progress(total_bytes, self._file_bytes, log_interval)
            stack.callback(progress.close)
            saved = time.monotonic()
            for batch, documents, tally in pool.encode(reader.batches(self._cursor)):
                self._write_batch(batch, documents, tally, writers)
                progress.advance(batch, documents)
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    self._positions = {name: writer.flush() for name, writer in writers.items()}
                    self.save()
                    saved = time.monotonic()
            self._check_result(writers, max_bad_share)
            self.manifests = {name: self._manifest(name, writer) for name, writer in writers.items()}
            self.save()

    def commit(self) -> None:
        """Rename the files. Can be repeated if it is interrupted."""
        for name, manifest in self.manifests.items():
            commit_corpus(self.plan.prefixes[name], self._journal.folder, manifest)
        self._journal.keep_problems(self.plan.skipped_path)

    def save(self) -> None:
        """Save what is needed to resume from here."""
        self._journal.save(
            {
                "tally": self.tally.as_json(),
                "positions": self._positions,
                "place": self._cursor,
                "file_bytes": self._file_bytes,
                "manifests": {name: manifest.as_json() for name, manifest in self.manifests.items()},
            }
        )

    def _write_batch(
        self, batch: Batch, documents: dict[str, Documents], tally: Tally, writers: dict[str, CorpusWriter]
    ) -> None:
        for name, group in documents.items():
            writers[name].add(group)
        self.tally.add(tally)
        self._journal.add_problems(tally.problems)
        self._cursor = batch.after
        self._file_bytes += batch.file_bytes

    def _check_result(self, writers: dict[str, CorpusWriter], max_bad_share: float) -> None:
        """Raise `UserError` if too many lines are malformed or a corpus has no tokens. A shard may be empty."""
        tally = self.tally
        empty = [writer for writer in writers.values() if self.plan.needs_text and writer.num_tokens == 0]
        if len(empty) == len(writers):
            sources = [source.path for source in self.plan.sources]
            raise UserError(f"{why_empty(sources, tally)}; nothing was written")
        if tally.num_skipped > max_bad_share * tally.num_read:
            raise UserError(
                f"{tally.num_skipped:,} of {tally.num_read:,} lines are malformed, more than --max-bad-share "
                f"{max_bad_share:g} (first: {tally.problems[0]}); nothing was written"
            )
        if empty:
            raise UserError(
                f"{empty[0].prefix} would contain no text, so nothing was written; check --json-keys and "
                "--validation-share"
            )

    def _manifest(self, name: str, writer: CorpusWriter) -> Manifest:
        files = writer.finalize()
        tally = self.tally.corpus(name)
        sources = {source.path: source for source in self.plan.sources}
        return Manifest(
            tokenizer=self.plan.tokenizer.record,
            append_eod=self.plan.encoder.eod_id is not None,
            sources=[
                ManifestSource(path, sources[path].bytes or None, sources[path].sha1, documents)
                for path, documents in tally.sources.items()
            ],
            languages=dict(sorted(tally.languages.items())),
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            skipped_lines=self.tally.num_skipped,
            files=files,
        )
