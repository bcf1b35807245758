r"""Sample random documents of tokenized corpora into a new corpus, for example the replay text of stage 2.

    moelpr data sample --output-prefix data/replay \
        --input data/en_text_document data/zh_text_document data/el_text_document data/hu_text_document \
        --original-documents 50000 --expanded-documents 100000

Each input is one language (or one original and one expanded language, distinguished by the language bits) and gives as
many documents as the flags say, or all that it has; a note says so. The sample depends only on the input's name and
--seed, not on the other inputs. Documents keep their order; training shuffles them. A document of both groups counts by
its first token; empty documents are never sampled.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.corpus.corpus import Corpus
from data_tools.corpus.corpus_writer import CorpusWriter, check_output, smallest_vocab_size
from data_tools.corpus.joining import missing_manifests, open_corpora, refuse_input_as_output
from data_tools.corpus.tokenized import Documents, runs_of
from moelpr.base.errors import UserError
from moelpr.base.settings import Count, Flags, Natural, metavar, run_script
from moelpr.base.text_tables import table_text
from moelpr.data.manifest import Bit, FileRecord, LanguageCount, Manifest, Source

BITS: tuple[Bit, Bit] = ("original", "expanded")
_TOKENS_AT_ONCE = 1 << 20


@dataclass
class Sample:
    """The documents sampled from one input and group."""

    corpus: Corpus
    bit: Bit
    names: dict[Bit, str]  # language name of each group, since a document may contain some text of the other group
    chosen: NDArray[np.int64]  # indices of the sampled documents, ascending [documents]
    available: int  # number of documents to sample from
    requested: int  # number of documents that the flags ask for
    num_tokens: int  # tokens of the sampled documents


class Settings(Flags):
    input: Annotated[list[str], metavar("PREFIX")]  # corpora, one per language
    output_prefix: Annotated[str, metavar("P")]  # write P.bin, P.idx and P.lang
    original_documents: Count | None = None  # at most N documents per original language
    expanded_documents: Count | None = None  # at most N documents per expanded language
    seed: Natural = 1234  # random seed
    overwrite: bool = False  # replace an existing corpus P

    def __post_init__(self) -> None:
        if not self.original_documents and not self.expanded_documents:
            raise UserError("pass --original-documents, --expanded-documents or both")
        if len({*map(os.path.realpath, self.input)}) < len(self.input):
            raise UserError("--input names a corpus twice; its documents would be sampled twice")
        refuse_input_as_output(self.input, self.output_prefix)


def main(arguments: Settings) -> None:
    check_output(arguments.output_prefix, arguments.overwrite)
    corpora, manifests = open_corpora(arguments.input)
    if corpora[0].loss_bits is not None:
        raise UserError(f"{corpora[0].prefix} has conversations; sample them with moelpr data preprocess --max-samples")
    samples: list[Sample] = []
    for number, corpus in enumerate(corpora):
        samples += sample_from(corpus, manifests[number] if manifests else None, arguments)
    if not samples:
        raise UserError(f"{', '.join(arguments.input)} contain no matching documents; nothing was written")
    with CorpusWriter(arguments.output_prefix, smallest_vocab_size(corpora[0]), arguments.overwrite) as writer:
        languages = write(samples, writer)
        files = writer.finalize()
        writer.commit(manifest_of(samples, languages, manifests[0], files) if manifests else None)
    print(writer)
    print_samples(samples)
    if not manifests:
        print(missing_manifests(corpora, arguments.output_prefix))


def sample_from(corpus: Corpus, manifest: Manifest | None, arguments: Settings) -> Iterator[Sample]:
    """Yield the sample of each group of an input; it depends only on its file name, its documents and the flags.

    Raises:
        UserError: A group to sample from contains several languages.
    """
    lengths = corpus.document_lengths
    documents_with_tokens = np.flatnonzero(lengths)
    is_original = corpus.bits.at((np.cumsum(lengths) - lengths)[documents_with_tokens])  # by the first token
    counts = manifest.languages.items() if manifest is not None else ()
    languages = {bit: sorted(name for name, count in counts if count.bit == bit and count.tokens) for bit in BITS}
    # The group's name stands for languages that no manifest names, and for several languages of the other group.
    names = {bit: codes[0] if len(codes) == 1 else bit for bit, codes in languages.items()}
    for group, bit in enumerate(BITS):
        requested = arguments.original_documents if bit == "original" else arguments.expanded_documents
        if requested is None:
            continue
        if len(languages[bit]) > 1:
            raise UserError(
                f"{corpus.prefix} contains {len(languages[bit])} {bit} languages ({', '.join(languages[bit])}) and "
                "does not record which document is in which; preprocess each language into a corpus of its own"
            )
        available = documents_with_tokens[is_original == (bit == "original")]
        if not len(available):
            continue
        name = zlib.crc32(Path(corpus.prefix).name.encode())
        order = np.random.default_rng([arguments.seed, name, group]).permutation(available)
        chosen = np.sort(order[:requested])
        yield Sample(corpus, bit, names, chosen, len(available), requested, int(lengths[chosen].sum()))


def write(samples: list[Sample], writer: CorpusWriter) -> dict[str, LanguageCount]:
    """Write the samples and return counts per language."""
    languages: dict[str, LanguageCount] = {}
    with tqdm(total=sum(sample.num_tokens for sample in samples), unit="token", unit_scale=True, disable=None) as bar:
        for sample in samples:
            # Pieces of about equal size, so that memory stays small.
            pieces = np.cumsum(sample.corpus.document_lengths[sample.chosen]) // _TOKENS_AT_ONCE
            for piece in np.split(sample.chosen, np.flatnonzero(np.diff(pieces)) + 1):
                ids, bits = zip(*map(sample.corpus.document, piece.tolist()), strict=True)
                flags, lengths = np.concatenate(bits), np.array([len(document) for document in ids])
                writer.add(Documents(np.concatenate(ids), lengths, runs_of(flags)))
                original = np.add.reduceat(flags, np.cumsum(lengths) - lengths, dtype=np.int64)
                for bit, tokens in zip(BITS, (original, lengths - original), strict=True):
                    if tokens.any():  # a document of both groups counts for each; the size of its text is unknown
                        count = languages.setdefault(sample.names[bit], LanguageCount(bit))
                        count.add(int((tokens > 0).sum()), int(tokens.sum()), 0)
                bar.update(len(flags))
    return languages


def manifest_of(
    samples: list[Sample], languages: dict[str, LanguageCount], any_input: Manifest, files: dict[str, FileRecord]
) -> Manifest:
    """Return the manifest of the new corpus, whose sources are the inputs' .bin files."""
    sources: dict[str, Source] = {}
    for sample in samples:
        path = sample.corpus.paths.bin
        source = sources.setdefault(str(path), Source(str(path), path.stat().st_size, None, 0))
        source.documents += len(sample.chosen)
    return Manifest(
        tokenizer=any_input.tokenizer,
        append_eod=any_input.append_eod,
        sources=list(sources.values()),
        languages=languages,
        documents=sum(len(sample.chosen) for sample in samples),
        tokens=sum(sample.num_tokens for sample in samples),
        skipped_lines=0,
        files=files,
    )


def print_samples(samples: list[Sample]) -> None:
    rows = []
    for sample in samples:
        counts = f"{len(sample.chosen):,}", f"{sample.available:,}", f"{sample.num_tokens:,}"
        rows.append([sample.names[sample.bit], sample.bit, *counts, str(sample.corpus.prefix)])
    head = ["language", "bit", "sampled", "of", "tokens", "from"]
    print(f"\n{table_text(head, rows, (0, 1, 5), indent='  ')}")
    for sample in samples:
        if sample.requested > sample.available:
            wanted = f"the requested {sample.requested:,} documents"
            print(f"note: {sample.corpus.prefix} contains less than {wanted}; all are used")


if __name__ == "__main__":
    run_script(main)
