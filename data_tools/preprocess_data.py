"""JSON lines or Parquet to a tokenized corpus: <output-prefix>_<key>_document.bin and .idx for Megatron, .lang for us.

The flags are those of Megatron-LM's tool of the same name, plus the language bit. It is always stated: for all of the
input (--language original), per document (--language-key lang --original-languages en,es,zh), per span of a document
(--spans-key spans), by a registry (--dataset), or asked of py3langid (--detect-language).

Several jobs share the work with --num-shards N, each with its own --shard; data_tools/merge_data.py joins what they
write into the bytes that one job would have written. docs/corpora.md has examples of everything.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from data_tools.corpus_writer import CorpusWriter, Position, commit_corpus
from data_tools.preprocessing.arguments import parse_arguments
from data_tools.preprocessing.encoder import EncodedBatch
from data_tools.preprocessing.journal import Journal
from data_tools.preprocessing.plan import Plan, make_plan
from data_tools.preprocessing.pool import EncodingPool
from data_tools.preprocessing.progress import Progress
from data_tools.preprocessing.readers import Place, Reader
from data_tools.preprocessing.report import no_text, print_report
from data_tools.preprocessing.tally import Tally
from moelpr.data.manifest import Manifest
from moelpr.data.manifest import Source as ManifestSource
from moelpr.errors import UserError, run_command

# What an interrupted job has done since it last saved its place is done again.
SAVE_EVERY_S = 30.0


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    arguments = parse_arguments(__doc__, argv)
    plan = make_plan(arguments)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    with Journal(plan.output_prefix, plan.settings, arguments.resume) as journal:
        job = Job.resumed(plan, journal) if journal.state else Job(plan, journal)
        if not job.manifests:
            job.write(arguments.workers, arguments.log_interval, arguments.overwrite, arguments.max_bad_share)
        job.commit()
    print_report(job.manifests, job.tally, plan, shows_languages=not arguments.language)
    print(f"done in {time.monotonic() - started:.1f} s")


@dataclass
class Job:
    """A job at work.

    Attributes:
        tally: of what has been written.
        positions: by corpus, how much of it has been written; as of the last save.
        place: what of the input has been written.
        file_bytes: of the input, read so far.
        manifests: by corpus; once they are there, nothing is left but giving the files their names.
    """

    plan: Plan
    journal: Journal
    tally: Tally = field(default_factory=Tally)
    positions: dict[str, Position] = field(default_factory=dict)
    place: Place = Place()
    file_bytes: int = 0
    manifests: dict[str, Manifest] = field(default_factory=dict)

    @classmethod
    def resumed(cls, plan: Plan, journal: Journal) -> Self:
        """Where the job before it was interrupted."""
        assert journal.state is not None
        state = journal.state
        print(f"note: going on after {state['file_bytes']:,} bytes of the input", file=sys.stderr)
        return cls(
            plan,
            journal,
            Tally.from_json(state["tally"]),
            {name: Position(*position) for name, position in state["positions"].items()},
            Place(*state["place"]),
            state["file_bytes"],
            {name: Manifest.from_json(content) for name, content in state["manifests"].items()},
        )

    def write(self, workers: int, log_interval: int, overwrite: bool, max_bad_share: float) -> None:
        """Encode and write all that is left of the input, under names that nobody takes for a corpus.

        Raises:
            UserError: the input can't be used, or makes no corpus worth keeping.
        """
        plan = self.plan
        reader = Reader(plan.shares, plan.columns, plan.chosen, self.journal.spool)
        total_bytes = sum(share.stop - share.start for share in plan.shares)
        with ExitStack() as stack:
            pool = stack.enter_context(EncodingPool(plan.encoder, workers, self.journal.spool))
            writers = {
                name: stack.enter_context(
                    CorpusWriter(
                        prefix, plan.encoder.vocab_size, overwrite, self.journal.folder, self.positions.get(name)
                    )
                )
                for name, prefix in plan.prefixes.items()
            }
            progress = stack.enter_context(Progress(total_bytes, self.file_bytes, log_interval))
            saved = time.monotonic()
            for batch in pool.encode(reader.batches(self.place)):
                self._write_batch(batch, writers, progress)
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    self.positions = {name: writer.flush() for name, writer in writers.items()}
                    self.save()
                    saved = time.monotonic()
            check_worth(plan, self.tally, writers, max_bad_share)
            self.manifests = {name: self._manifest(name, writer) for name, writer in writers.items()}
            self.save()

    def commit(self) -> None:
        """Give the files their names. Killed in the middle of it, it can be done again."""
        for name, manifest in self.manifests.items():
            commit_corpus(self.plan.prefixes[name], self.journal.folder, manifest)
        self.journal.keep_problems(self.plan.skipped_path)

    def save(self) -> None:
        """Save what is needed to go on from here."""
        self.journal.save(
            {
                "tally": self.tally.as_json(),
                "positions": self.positions,
                "place": self.place,
                "file_bytes": self.file_bytes,
                "manifests": {name: manifest.as_json() for name, manifest in self.manifests.items()},
            }
        )

    def _write_batch(self, batch: EncodedBatch, writers: dict[str, CorpusWriter], progress: Progress) -> None:
        for name, documents in batch.documents.items():
            writers[name].add(documents)
        self.tally.add(batch.tally)
        self.journal.add_problems(batch.problems)
        self.place = batch.after
        self.file_bytes += batch.file_bytes
        progress.advance(
            sum(len(documents.lengths) for documents in batch.documents.values()),
            sum(len(documents.tokens) for documents in batch.documents.values()),
            batch.num_bytes,
            batch.file_bytes,
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


def check_worth(plan: Plan, tally: Tally, writers: dict[str, CorpusWriter], max_bad_share: float) -> None:
    """See whether the corpora are worth keeping. A shard may be empty.

    Raises:
        UserError: one of them is without tokens, or too many lines were broken.
    """
    empty = [writer for writer in writers.values() if writer.num_tokens == 0] if plan.needs_text else []
    if len(empty) == len(writers):
        raise UserError(f"{no_text([source.path for source in plan.sources], tally)}; nothing was written")
    if tally.num_skipped > max_bad_share * tally.num_read:
        raise UserError(
            f"{tally.num_skipped:,} of {tally.num_read:,} lines are broken, more than --max-bad-share "
            f"{max_bad_share:g} (first: {tally.problems[0]}); nothing was written"
        )
    if empty:
        raise UserError(
            f"{empty[0].prefix} would be without any text; look at --json-keys and --validation-share. Nothing was "
            f"written"
        )


if __name__ == "__main__":
    run_command(main)
