r"""Add language bits and a manifest, next to its files, to a corpus in one language by Megatron's own tool.

    moelpr data tag data/el_text_document --language el --bit expanded \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen1.5-1.8B
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from data_tools.corpus.corpus import CorpusPaths, describe
from data_tools.corpus.corpus_writer import commit_corpus
from data_tools.corpus.tokenized import token_dtype
from data_tools.preprocessing.job_tokenizer import JobTokenizer, tokenizer_of
from data_tools.preprocessing.settings import GROUPS, TokenizerFlags
from moelpr.base.errors import UserError
from moelpr.base.files import empty, fsync_file, locked_folder, refuse_existing
from moelpr.base.journal import partial_name
from moelpr.base.languages import canonical, is_code
from moelpr.base.settings import POSITIONAL, run_script
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source


class Settings(TokenizerFlags):
    prefix: Annotated[str, POSITIONAL]  # path of the corpus without .bin or .idx
    language: str  # language of all documents, such as eu
    bit: Literal["original", "expanded"]  # whether it is an original or an expanded language
    overwrite: bool = False  # replace existing language bits
    append_eod: bool = True  # documents do not end with such a token


def main(args: Settings) -> None:
    if args.language not in GROUPS and not is_code(args.language):
        raise UserError(f"--language must be a code such as eu or eus_Latn, got {args.language}")
    prefix, index, paths = args.prefix, CorpusIndex.open(args.prefix), CorpusPaths.of(args.prefix)
    tokens, documents, tokenizer = index.num_tokens, len(index.document_starts) - 1, tokenizer_of(args, args.append_eod)
    folder = partial_name(Path(prefix))
    lang = folder / paths.lang.name
    with locked_folder(folder, prefix):
        try:
            refuse_existing([paths.lang], args.overwrite)
            empty(folder)
            check_tokens(paths.bin, index, tokenizer, tokenizer.record.eod_id if args.append_eod else None)
            with LanguageBitsWriter(lang) as writer:
                writer.append_runs(np.array([tokens << 1 | (args.bit == "original")]))
                writer.finalize()
            fsync_file(lang)
            files = {path.suffix[1:]: FileRecord.of(path) for path in (paths.bin, paths.idx, lang)}
            sources = [Source(str(paths.bin), files["bin"].bytes, None, documents)]
            languages = {canonical(args.language): LanguageCount(args.bit, documents, tokens)}
            manifest = Manifest(tokenizer.record, args.append_eod, sources, languages, documents, tokens, 0, files)
            commit_corpus(prefix, folder, manifest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(describe(prefix, documents, tokens, tokens * (args.bit == "original"), index.dtype))


def check_tokens(path: Path, index: CorpusIndex, tokenizer: JobTokenizer, eod_id: int | None) -> None:
    """Raise `UserError` unless the corpus can have been made with this tokenizer."""
    vocab_size, model = tokenizer.record.vocab_size, tokenizer.record.model
    if not index.num_tokens:
        raise UserError(f"{path} contains no tokens; tag another corpus")
    tokens = np.memmap(path, f"<u{index.dtype.itemsize}", "r")  # an ID below 0 is a large one
    if index.dtype != token_dtype(vocab_size) or tokens.max() >= vocab_size:
        contents = f"{path} has {index.dtype.name} tokens up to {tokens.max():,}"
        raise UserError(f"{contents}, unlike the {vocab_size:,} of {model}; pass the corpus's own tokenizer")
    edges = np.unique(np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])[index.document_starts])
    around = [(id, edges[:-1], "begin", "--tokenizer-hf-no-include-special-tokens") for id in tokenizer.prefix[:1]]
    around += [(id, edges[1:] - 1, "end", "--eod-token or --no-append-eod") for id in [eod_id] if id is not None]
    for id, places, verb, flag in around:
        if wrong := int((tokens[places] != id).sum()):
            raise UserError(f"{wrong:,} of {len(places):,} documents of {path} do not {verb} with {id}; pass {flag}")


if __name__ == "__main__":
    run_script(main)
