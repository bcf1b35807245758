"""Join corpora into one: the bytes that one preprocessing job over all the input would write, manifest included.

    python data_tools/merge_data.py --output-prefix data/expanded_text_document --num-shards 8
    python data_tools/merge_data.py --output-prefix data/all --input data/el_text_document data/hu_text_document

The first joins the shards that `preprocess_data.py --num-shards 8` wrote beside --output-prefix.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.corpus import Corpus, CorpusPaths, shard_prefix
from data_tools.corpus_writer import CorpusWriter
from data_tools.manifests import merged, missing_manifests, read_manifests
from moelpr.data.manifest import manifest_path
from moelpr.errors import UserError, run_command
from moelpr.files import refuse_existing


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    prefixes = arguments.input or [
        shard_prefix(arguments.output_prefix, shard, arguments.num_shards) for shard in range(arguments.num_shards)
    ]
    merge(prefixes, arguments.output_prefix, arguments.overwrite)
    if arguments.remove_input:
        for prefix in prefixes:
            for path in (*CorpusPaths.of(prefix), manifest_path(prefix)):
                path.unlink(missing_ok=True)


def merge(prefixes: list[str], output_prefix: str, overwrite: bool = False) -> None:
    """Write the corpora `prefixes`, in this order, as one.

    Raises:
        UserError: one is missing, damaged or of another tokenizer, they are all empty, or the output exists.
    """
    refuse_existing(list(CorpusPaths.of(output_prefix)), overwrite)
    corpora = [Corpus(prefix) for prefix in prefixes]
    if not any(len(corpus.tokens) for corpus in corpora):
        raise UserError(f"{', '.join(prefixes)} hold no tokens; nothing was written")
    manifests = read_manifests(corpora)
    # A vocabulary that is stored in the type of the first corpus; add_corpus() compares the others.
    vocab_size = 1 if corpora[0].tokens.dtype.itemsize == 2 else 1 << 31
    with CorpusWriter(output_prefix, vocab_size, overwrite) as writer:
        for corpus in tqdm(corpora, unit="corpus", delay=2, disable=None):
            writer.add_corpus(corpus)
        files = writer.finalize()
        writer.commit(merged(manifests, files) if manifests else None)
    print(
        f"{output_prefix}.bin, .idx, .lang: {len(corpora)} corpora, {writer.num_documents:,} documents, "
        f"{writer.num_tokens:,} tokens ({writer.num_original / writer.num_tokens:.1%} original-language), "
        f"{np.dtype(writer.dtype).name}"
    )
    if manifests is None:
        print(missing_manifests(corpora, output_prefix))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="write P.bin, P.idx and P.lang")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--num-shards", type=int, metavar="N", help="join the N shards of P")
    way.add_argument("--input", nargs="+", metavar="PREFIX", help="join these corpora, in this order")
    parser.add_argument("--remove-input", action="store_true", help="remove what was joined once the whole is written")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.num_shards is not None and arguments.num_shards < 1:
        raise UserError(f"--num-shards {arguments.num_shards} must be at least 1")
    if arguments.input and Path(arguments.output_prefix) in map(Path, arguments.input):
        raise UserError(f"--output-prefix {arguments.output_prefix} is one of the inputs; choose another name")
    return arguments


if __name__ == "__main__":
    run_command(main)
