r"""Clean text before it is tokenized: by language, near duplicates, and what evaluations contain.

    moelpr data clean --input data/el --output clean/el --language-id glotlid.bin --languages el \
        --decontaminate data/el-test.jsonl belebele_ell_Grek
    moelpr data preprocess --input clean/el ...

The steps, in this order: language identification (--language-id), removal of documents that share 12 words in a row
with a text of --decontaminate, and removal of near duplicates (MinHash), of which one stays. They are datatrove's, and
run in --workers processes of this machine, as jobs of Slurm, or on Ray. OUTPUT/_removed has what was removed, and
report.json. An interrupted command goes on when it is run again.
"""

import argparse
import os
import shutil
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moelpr.languages import canonical, is_code
from moelpr.process.command import CommandParser, run_command
from moelpr.process.errors import UserError
from moelpr.process.machine import available_cpus
from moelpr.process.versions import install_command
from moelpr.store.files import LOCK_FILE, locked_folder, refuse_existing
from moelpr.store.journal import Journal, partial_name

_TASK_BYTES = 32 << 20
_MOST_TASKS = 256
_PACKAGES = ("datatrove", "orjson", "xxhash", "zstandard")


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    arguments = parse_arguments(argv)
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here; run {install_command('clean')}")
    output = Path(os.path.abspath(arguments.output))
    refuse_existing([output], arguments.overwrite)
    work = partial_name(output)
    with locked_folder(work, output):
        try:
            clean(arguments, output, work)
        except UserError:
            if [*work.iterdir()] == [work / LOCK_FILE]:
                shutil.rmtree(work)  # nothing in it could be resumed
            raise
    if output.exists() and arguments.executor != "slurm":
        shutil.rmtree(work)
        print(f"done in {time.monotonic() - started:.1f} s")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    files = "JSON lines (plain, .gz, .zst, .bz2, .xz) or Parquet: files, folders, patterns"
    add("--input", nargs="+", required=True, metavar="FILE", help=files)
    add("--output", required=True, metavar="FOLDER", help="folder to make, with the cleaned text")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="form of the text (default: jsonl, as .zst)")
    add("--json-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    stated = parser.add_mutually_exclusive_group()
    one = "language of all documents, such as el; with --language-id, others are removed"
    stated.add_argument("--language", metavar="CODE", help=one)
    key = "key of a document's language; with --language-id, documents in another are removed"
    stated.add_argument("--language-key", metavar="KEY", help=key)
    skip = "stop at a malformed or empty line, or remove it (default: stop)"
    add("--on-error", choices=("stop", "skip"), default="stop", help=skip)

    add = parser.add_argument_group("steps").add_argument
    model = "identify languages by py3langid, or by a fastText model (GlotLID, lid.176), the path of its file"
    add("--language-id", metavar="MODEL", help=model)
    add("--languages", metavar="A,B", help="languages to keep (default: all)")
    confidence = "probability below which a language is uncertain, and the document removed (default: 0.5)"
    add("--min-confidence", type=float, default=0.5, metavar="X", help=confidence)
    references = "remove what shares words with these: files of text, or benchmarks of lm-evaluation-harness by name"
    add("--decontaminate", nargs="+", default=[], metavar="WHAT", help=references)
    add("--ngram-words", type=int, default=12, metavar="N", help="words in a row that they share (default: 12)")
    duplicates = "remove near duplicates (default: they are removed)"
    add("--near-duplicates", action=argparse.BooleanOptionalAction, default=True, help=duplicates)
    buckets = "MinHash buckets; more find less similar documents (default: 14)"
    add("--minhash-buckets", type=int, default=14, metavar="N", help=buckets)
    hashes = "hashes of a bucket; fewer find less similar documents (default: 8)"
    add("--minhash-hashes", type=int, default=8, metavar="N", help=hashes)

    add = parser.add_argument_group("execution").add_argument
    cores = available_cpus()
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="where to run (default: local)")
    add("--workers", type=int, default=cores, metavar="N", help=f"tasks at a time (default: one per core, {cores})")
    tasks = "tasks that share the input, each with a file of output (default: one per 32 MiB, at most 256)"
    add("--tasks", type=int, metavar="N", help=tasks)
    add("--partition", metavar="NAME", help="partition of Slurm")
    add("--time", metavar="T", default="24:00:00", help="time limit of a Slurm job (default: 24:00:00)")
    add("--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="more options of sbatch, such as account=a")
    arguments = parser.parse_args(argv)
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Raise an error if values are out of range, or would be ignored."""
    for name in ("workers", "tasks", "ngram_words", "minhash_buckets", "minhash_hashes"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= arguments.min_confidence <= 1:
        raise UserError(f"--min-confidence must be between 0 and 1, got {arguments.min_confidence}")
    if arguments.languages and not arguments.language_id:
        raise UserError("--languages needs --language-id, the model that identifies them")
    codes = [*(arguments.languages or "").split(","), arguments.language or ""]
    if wrong := [code.strip() for code in codes if code.strip() and not is_code(code.strip())]:
        raise UserError(f"{wrong[0]} is no code of a language; pass one such as el or ell_Grek")
    if (arguments.executor == "slurm") != bool(arguments.partition):
        raise UserError("--executor slurm and --partition NAME need each other")
    if wrong := [option for option in arguments.sbatch if "=" not in option]:
        raise UserError(f"--sbatch takes KEY=VALUE, such as account=a, got {wrong[0]}")
    if arguments.executor != "slurm" and arguments.sbatch:
        raise UserError("--sbatch needs --executor slurm")
    steps = arguments.language_id, arguments.decontaminate, arguments.near_duplicates
    if not any(steps):
        raise UserError("nothing to do; pass --language-id or --decontaminate, or omit --no-near-duplicates")


def clean(arguments: argparse.Namespace, output: Path, work: Path) -> None:
    """Run the steps, or submit them."""
    from data_tools.cleaning.blocks import TextReader
    from data_tools.cleaning.pipeline import Finish, refuse_running, run_locally, run_on_ray, stages_of, submit_to_slurm
    from data_tools.cleaning.tally import CleaningReport
    from moelpr.text.language_id import load_identifier

    refuse_running(work)
    reader = TextReader(arguments.input, arguments.json_key, arguments.language, arguments.language_key)
    codes = frozenset(canonical(code.strip()) for code in (arguments.languages or "").split(",") if code.strip())
    model = arguments.language_id
    identifier = load_identifier(model, codes, arguments.min_confidence) if model else None
    size = sum(source.bytes for source in reader.sources)
    arguments.tasks = arguments.tasks or min(max(-(-size // _TASK_BYTES), 1), _MOST_TASKS)
    settings = settings_of(arguments)
    named = [*(source.path for source in reader.sources), *arguments.decontaminate, model or ""]
    states = {os.path.abspath(file): os.stat(file) for file in named if os.path.exists(file)}
    files: dict[str, Any] = {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
    files |= {source.path: [source.bytes, source.version] for source in reader.sources if source.uri}
    journal = Journal(work, {"settings": settings, "files": files})
    if arguments.decontaminate and not journal.entries(str):
        print_index(arguments, work)
        journal.add("index")
    stages = stages_of(arguments, reader, identifier, codes, work, Finish(output, work, settings))
    if arguments.executor == "slurm":
        options = dict(option.split("=", 1) for option in arguments.sbatch)
        jobs = submit_to_slurm(stages, work, arguments.workers, arguments.partition, arguments.time, options)
        print(f"submitted jobs {', '.join(jobs)}; the last one makes {output}; the logs are in {work}/logs")
        return
    run = run_locally if arguments.executor == "local" else run_on_ray
    run(stages, work, arguments.workers)
    report = CleaningReport.read(output / "_removed")
    print(report.text())
    if not report.kept.languages:
        print(f"note: nothing is left; {output}/_removed shows why")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the result depends on, besides the content of files."""
    how = ("output", "overwrite", "workers", "executor", "partition", "time", "sbatch", "debug")
    settings = {name: value for name, value in vars(arguments).items() if name not in how}
    versions = {package: metadata.version(package) for package in ("moelpr", "datatrove")}
    return settings | {"versions": versions}


def print_index(arguments: argparse.Namespace, work: Path) -> None:
    """Write the n-grams of what must not be trained on, and print how many texts they are from."""
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig

    from data_tools.cleaning.references import texts_of, write_index

    config = NGramsDecontConfig(n_grams=arguments.ngram_words)
    shutil.rmtree(work / "index", ignore_errors=True)
    for reference in arguments.decontaminate:
        count, short = write_index(work / "index", reference, texts_of(reference, arguments.json_key), config)
        note = f", {short:,} of them shorter than {config.n_grams} words, which are not looked for" if short else ""
        print(f"{reference}: {count:,} texts{note}")


if __name__ == "__main__":
    run_command(main)
