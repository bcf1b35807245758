"""Join corpora: write the bytes that a single preprocessing job over all the input would write, including the manifest.

    moelpr data merge --output-prefix data/expanded_text_document --num-shards 8
    moelpr data merge --output-prefix data/all --input data/el_text_document data/hu_text_document

The first joins the shards that `moelpr data preprocess --num-shards 8` wrote next to --output-prefix.
"""

import argparse
import os

from tqdm import tqdm

from data_tools.corpus.corpus import Corpus, CorpusPaths, shard_prefix
from data_tools.corpus.corpus_writer import CorpusWriter, check_output, smallest_vocab_size
from data_tools.corpus.joining import check_same_job, merge_manifests, missing_manifests, open_corpora
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import refuse_existing
from moelpr.data.language_bits import loss_bits_path
from moelpr.data.manifest import manifest_path
from moelpr.data.text.held_out_text import joined_text


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output_prefix, overwrite, num_shards = arguments.output_prefix, arguments.overwrite, arguments.num_shards
    prefixes = arguments.input or [shard_prefix(output_prefix, shard, num_shards) for shard in range(num_shards)]
    for prefix in prefixes:
        Corpus(prefix)  # a missing input is reported before an existing output
    check_output(output_prefix, overwrite)
    text = joined_text(prefixes, output_prefix)
    if text is not None:
        refuse_existing([text.joined], overwrite)
    corpora, manifests = open_corpora(prefixes)
    if num_shards and manifests:
        check_same_job(prefixes, manifests)
    if not any(len(corpus.tokens) for corpus in corpora):
        raise UserError(f"{', '.join(prefixes)} contain no tokens; nothing was written")
    has_conversations = corpora[0].loss_bits is not None
    vocab_size = smallest_vocab_size(corpora[0])
    with CorpusWriter(output_prefix, vocab_size, overwrite, has_conversations=has_conversations) as writer:
        for corpus in tqdm(corpora, unit="corpus", delay=2, disable=None):
            writer.add_corpus(corpus)
        files = writer.finalize()
        if text is not None:
            text.join()
        writer.commit(merge_manifests(manifests, files) if manifests else None)
    print(writer)
    if text is not None:
        print(f"{text.joined}: its text as JSON lines")
    if manifests is None:
        print(missing_manifests(corpora, output_prefix))
    if arguments.remove_input:
        for prefix in prefixes:
            for path in (*CorpusPaths.of(prefix), loss_bits_path(prefix), manifest_path(prefix)):
                path.unlink(missing_ok=True)
        for path in text.parts if text is not None else ():
            path.unlink(missing_ok=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="write P.bin, P.idx and P.lang")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--num-shards", type=int, metavar="N", help="join the N shards of P")
    group.add_argument("--input", nargs="+", metavar="PREFIX", help="join these corpora, in this order")
    parser.add_argument("--remove-input", action="store_true", help="delete inputs after a successful merge")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus P")
    arguments = parser.parse_args(argv)
    if arguments.num_shards is not None and arguments.num_shards < 1:
        raise UserError(f"--num-shards must be at least 1, got {arguments.num_shards}")
    inputs = [os.path.realpath(prefix) for prefix in arguments.input or ()]
    if os.path.realpath(arguments.output_prefix) in inputs:
        raise UserError(f"--output-prefix {arguments.output_prefix} is one of the inputs; choose another name")
    return arguments


if __name__ == "__main__":
    run_command(main)
