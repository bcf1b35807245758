r"""Clean a raw crawl before it is tokenized: by language, by what evaluations contain, and by near duplicates.

    python -m examples.clean_text data/el --output clean/el --language-id glotlid/model.bin --languages el \
        --held-out data/el-test.jsonl

The blocks are datatrove's (pip install datatrove orjson 'xxhash<4'; .venv has them). INPUT is a folder of JSON lines,
perhaps compressed, of which each file is a task; for other forms, put datatrove's ParquetReader or WarcReader in the
place of JsonlReader, and for more filters, such as GopherQualityFilter, add them to `filters`. OUTPUT_removed has what
was removed, by step. OUTPUT.unfinished keeps the tasks that are complete: after a kill, the same command continues.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import regex
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import refuse_existing
from moelpr.base.languages import canonical
from moelpr.base.machine import available_cpus
from moelpr.data.text.language_id import Detector, FastTextModel, load_identifier
from moelpr.data.text.reading import read_documents


class Words(WordTokenizer):
    """Splits text of any language into words; a character is one in scripts without spaces between words.

    datatrove's own tokenizers need a package, and some a download, per language.
    """

    _DENSE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    _WORD = regex.compile(rf"[{_DENSE}]|[\w--[{_DENSE}]]+", regex.V1)

    def word_tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self._WORD.finditer(text)]


def has_language(identifier: FastTextModel | Detector, languages: frozenset[str], document: Document) -> bool:
    """Note a document's language, and return whether it is one of `languages`."""
    document.metadata["language"] = identifier.language(document.text)
    return document.metadata["language"] in languages


def write_index(folder: Path, files: list[str], config: NGramsDecontConfig) -> None:
    """Write the n-grams of held-out text; datatrove's own indexer needs lighteval."""
    folder.mkdir(parents=True, exist_ok=True)
    hash_text = create_hash_func(config.hash_config)
    for number, file in enumerate(files):
        words = (Words().word_tokenize(simplify_text(text, config.norm_config)) for text in read_documents(file))
        hashes = {hash_text(" ".join(gram)) for seen in words for gram in ngrams(seen, config.n_grams)}
        np.array(sorted(hashes), config.hash_config.np_descr).tofile(folder / f"{number}.index.hashes")


def clean(arguments: argparse.Namespace, output: Path, work: Path) -> None:
    """Run the steps. The last one reads what the filters keep again, because MinHash compares all documents first."""
    removed = output.with_name(f"{output.name}_removed")
    tasks = len(list(Path(arguments.input).glob(arguments.files)))
    if not tasks:
        raise UserError(f"no file in {arguments.input} matches {arguments.files}; pass its folder, and --files")
    languages = frozenset(map(canonical, arguments.languages.split(",")))
    identifier = load_identifier(arguments.language_id, languages, min_confidence=0.5)

    def write(folder: Path) -> JsonlWriter:
        return JsonlWriter(str(folder), expand_metadata=True)

    def run(name: str, steps: list[Any], tasks: int) -> None:
        logs = str(work / "logs" / name)
        LocalPipelineExecutor(steps, tasks, min(arguments.workers, tasks), logging_dir=logs).run()

    decontamination = NGramsDecontConfig(n_grams=12)
    write_index(work / "index", arguments.held_out, decontamination)
    filters = [
        LambdaFilter(partial(has_language, identifier, languages), write(removed / "language")),
        NGramsDecontFilter(str(work / "index"), decontamination, write(removed / "held_out"), Words()),
    ]
    run("filter", [JsonlReader(arguments.input, glob_pattern=arguments.files), *filters, write(work / "text")], tasks)

    if not (tasks := len(list((work / "text").glob("*.gz")))):
        raise UserError(f"nothing is left; {removed} has what was removed, so correct --languages or the input")
    signatures, pairs, remove = (str(work / name) for name in ("signatures", "pairs", "remove"))
    config, text = MinhashConfig(), JsonlReader(str(work / "text"))
    run("signatures", [text, MinhashDedupSignature(signatures, config, Words())], tasks)
    run("pairs", [MinhashDedupBuckets(signatures, pairs, config=config)], config.num_buckets)
    run("clusters", [MinhashDedupCluster(pairs, remove, config)], 1)
    run("result", [text, MinhashDedupFilter(remove, write(removed / "near_duplicates")), write(work / "result")], tasks)
    (work / "result").rename(output)
    shutil.rmtree(work)


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", help="folder of JSON lines, with the text under text")
    add("--files", default="**/*.jsonl*", metavar="PATTERN", help="files of it (default: **/*.jsonl*)")
    add("--output", required=True, metavar="FOLDER", help="folder to make")
    add("--language-id", default="py3langid", metavar="MODEL", help="py3langid (default), or a fastText model's file")
    add("--languages", required=True, metavar="A,B", help="languages to keep, such as el")
    add("--held-out", nargs="*", default=[], metavar="FILE", help="remove what has 12 words in a row of these texts")
    add("--workers", type=int, default=available_cpus(), metavar="N", help="tasks at a time (default: one per core)")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output).absolute()
    refuse_existing([output], overwrite=False)
    clean(arguments, output, output.with_name(f"{output.name}.unfinished"))


if __name__ == "__main__":
    run_command(main)
