r"""Draw documents at random from tokenized corpora into a new one: as many of each language as stage 2 wants.

    python data_tools/sample_data.py --output-prefix data/review \
        --input data/en_text_document data/zh_text_document data/el_text_document data/hu_text_document \
        --original-documents 50000 --expanded-documents 100000

Each input is one language (or one original and one expanded language, which its bits tell apart), and gives as many
documents as the flags say. An input of the same name and the same --seed give the same documents, whatever the others
are. They keep their order; training shuffles. A document of both groups counts as what its first token is; empty ones
are never drawn.
"""

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.corpus import Corpus, CorpusPaths
from data_tools.corpus_writer import CorpusWriter, Documents
from data_tools.manifests import missing_manifests, read_manifests
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source
from moelpr.errors import UserError, run_command
from moelpr.files import refuse_existing

Bit = Literal["original", "expanded"]
BITS: tuple[Bit, Bit] = ("original", "expanded")
_TOKENS_AT_ONCE = 1 << 20


@dataclass
class Draw:
    """What one input gives of one group.

    Attributes:
        bit: the group, "original" or "expanded".
        names: the languages' names by bit, for a document may hold some text of the other group.
        chosen: [documents] numbers of the documents drawn, ascending.
        available: documents that could have been drawn.
        wanted: "50,000 documents", as the flags say.
        is_short: whether there were fewer.
        num_tokens: of the documents drawn.
    """

    corpus: Corpus
    bit: Bit
    names: dict[Bit, str]
    chosen: NDArray[np.int64]
    available: int
    wanted: str
    is_short: bool
    num_tokens: int


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    refuse_existing(list(CorpusPaths.of(arguments.output_prefix)), arguments.overwrite)
    corpora = [Corpus(prefix) for prefix in arguments.input]
    manifests = read_manifests(corpora)
    draws: list[Draw] = []
    for number, corpus in enumerate(corpora):
        draws += draw_from(corpus, manifests[number] if manifests else None, arguments)
    if not draws:
        raise UserError(f"{', '.join(arguments.input)} hold nothing of what the flags ask for; nothing was written")
    # A vocabulary that is stored in the type of the first corpus.
    vocab_size = 1 if corpora[0].tokens.dtype.itemsize == 2 else 1 << 31
    with CorpusWriter(arguments.output_prefix, vocab_size, arguments.overwrite) as writer:
        languages = write(draws, writer)
        files = writer.finalize()
        writer.commit(manifest_of(draws, languages, manifests[0], files) if manifests else None)
    report(draws, writer)
    if not manifests:
        print(missing_manifests(corpora, arguments.output_prefix))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="corpora, a language each")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="write P.bin, P.idx and P.lang")
    for bit in BITS:
        way = parser.add_mutually_exclusive_group()
        way.add_argument(
            f"--{bit}-documents", type=int, metavar="N", help=f"documents of each {bit} language (default: none)"
        )
        way.add_argument(
            f"--{bit}-tokens",
            type=int,
            metavar="N",
            help="the same in tokens: documents are drawn until they hold N or more",
        )
    parser.add_argument("--seed", type=int, default=1234, help="of the draw (default: 1234, as Megatron's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    counts = {f"--{bit}-{unit}": wanted(arguments, bit, unit) for bit in BITS for unit in ("documents", "tokens")}
    given = {flag: count for flag, count in counts.items() if count is not None}
    if not given:
        raise UserError(f"nothing says how much to draw; give {', '.join(counts)}")
    for flag, count in (given | {"--seed": arguments.seed + 1}).items():
        if count < 1:
            raise UserError(f"{flag} must be at least {0 if flag == '--seed' else 1}")
    if len(set(arguments.input)) < len(arguments.input):
        raise UserError("--input names a corpus twice; its documents would be drawn twice")
    if arguments.output_prefix in arguments.input:
        raise UserError(f"--output-prefix {arguments.output_prefix} is one of the inputs; choose another name")
    return arguments


def wanted(arguments: argparse.Namespace, bit: str, unit: str) -> int | None:
    count: int | None = getattr(arguments, f"{bit}_{unit}")
    return count


def draw_from(corpus: Corpus, manifest: Manifest | None, arguments: argparse.Namespace) -> Iterator[Draw]:
    """What an input gives of each group; it depends on its file name, its documents and the flags only.

    Raises:
        UserError: a group that is drawn from holds several languages.
    """
    lengths, is_original = corpus.document_lengths, corpus.is_original_document
    languages = {bit: languages_of(manifest, bit) for bit in BITS}
    # Where no manifest names them, and for text of the other group that is of several: the group's name.
    names = {bit: found[0] if len(found) == 1 else bit for bit, found in languages.items()}
    for group, bit in enumerate(BITS):
        documents, tokens = (wanted(arguments, bit, unit) for unit in ("documents", "tokens"))
        if documents is None and tokens is None:
            continue
        if len(languages[bit]) > 1:
            raise UserError(
                f"{corpus.prefix} holds {len(languages[bit])} {bit} languages ({', '.join(languages[bit])}), and "
                "nothing says which document is of which; preprocess each into a corpus of its own"
            )
        available = np.flatnonzero((lengths > 0) & (is_original if bit == "original" else ~is_original))
        if not len(available):
            continue
        name = zlib.crc32(Path(corpus.prefix).name.encode())
        order = np.random.default_rng([arguments.seed, name, group]).permutation(available)
        if documents is not None:
            stop, said = documents, f"{documents:,} documents"
        else:
            # One document more than those that hold less than is wanted.
            assert tokens is not None
            stop, said = int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1, f"{tokens:,} tokens"
        chosen = np.sort(order[:stop])
        yield Draw(corpus, bit, names, chosen, len(available), said, stop > len(available), int(lengths[chosen].sum()))


def languages_of(manifest: Manifest | None, bit: str) -> list[str]:
    languages = manifest.languages if manifest is not None else {}
    return sorted(name for name, count in languages.items() if count.bit == bit and count.tokens)


def write(draws: list[Draw], writer: CorpusWriter) -> dict[str, LanguageCount]:
    """Write what was drawn; returns what it holds of each language."""
    languages: dict[str, LanguageCount] = {}
    with tqdm(total=sum(draw.num_tokens for draw in draws), unit="token", unit_scale=True, disable=None) as progress:
        for draw in draws:
            if draw.corpus.tokens.dtype != writer.dtype:
                raise UserError(
                    f"{draw.corpus.paths.bin} holds {draw.corpus.tokens.dtype.name}, the corpora before it "
                    f"{writer.dtype.name}; sample from corpora of one tokenizer"
                )
            # Pieces of about equal size, so that memory stays small.
            pieces = np.cumsum(draw.corpus.document_lengths[draw.chosen]) // _TOKENS_AT_ONCE
            for piece in np.split(draw.chosen, np.flatnonzero(np.diff(pieces)) + 1):
                documents = read(draw.corpus, piece.tolist())
                writer.add(documents)
                count(documents, draw.names, languages)
                progress.update(len(documents.tokens))
    return languages


def read(corpus: Corpus, numbers: list[int]) -> Documents:
    ids, bits = zip(*map(corpus.document, numbers), strict=True)
    tokens, flags = np.concatenate(ids), np.concatenate(bits)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flags)) + 1])
    run_lengths = np.diff(np.append(starts, len(flags)))
    return Documents(tokens, np.array([len(document) for document in ids]), flags[starts], run_lengths)


def count(documents: Documents, names: dict[Bit, str], languages: dict[str, LanguageCount]) -> None:
    """Add documents to the counts; one of several languages counts for each. Its text's bytes are no longer known."""
    flags = np.repeat(documents.run_bits, documents.run_lengths)
    original = np.add.reduceat(flags, np.cumsum(documents.lengths) - documents.lengths, dtype=np.int64)
    for bit, tokens in zip(BITS, (original, documents.lengths - original), strict=True):
        if tokens.any():
            known = languages.setdefault(names[bit], LanguageCount(bit))
            known.documents += int((tokens > 0).sum())
            known.tokens += int(tokens.sum())


def manifest_of(
    draws: list[Draw], languages: dict[str, LanguageCount], any_input: Manifest, files: dict[str, FileRecord]
) -> Manifest:
    """The new corpus's manifest; its sources are the corpora that were drawn from."""
    sources: dict[str, Source] = {}
    for draw in draws:
        path = draw.corpus.paths.bin
        source = sources.setdefault(str(path), Source(str(path), path.stat().st_size, None, 0))
        source.documents += len(draw.chosen)
    return Manifest(
        tokenizer=any_input.tokenizer,
        append_eod=any_input.append_eod,
        sources=list(sources.values()),
        languages=languages,
        documents=sum(len(draw.chosen) for draw in draws),
        tokens=sum(draw.num_tokens for draw in draws),
        skipped_lines=0,
        files=files,
    )


def report(draws: list[Draw], writer: CorpusWriter) -> None:
    print(
        f"{writer.prefix}.bin, .idx, .lang: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
        f"({writer.num_original / writer.num_tokens:.1%} original-language), {writer.dtype.name}"
    )
    print(f"\n  {'language':<16}{'bit':<10}{'drawn':>13}{'of':>13}{'tokens':>18}   from")
    for draw in draws:
        print(
            f"  {draw.names[draw.bit]:<16}{draw.bit:<10}{len(draw.chosen):>13,}{draw.available:>13,}"
            f"{draw.num_tokens:>18,}   {draw.corpus.prefix}"
        )
    for draw in draws:
        if draw.is_short:
            print(f"note: {draw.corpus.prefix} holds fewer than the {draw.wanted} asked for; all of it was taken")


if __name__ == "__main__":
    run_command(main)
