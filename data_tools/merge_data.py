"""Join corpora: write the bytes that a single preprocessing job over all the input would write, including the manifest.

    moelpr data merge --output-prefix data/expanded_text_document --num-shards 8
    moelpr data merge --output-prefix data/all --input data/el_text_document data/hu_text_document

The first joins the shards that `moelpr data preprocess --num-shards 8` wrote next to --output-prefix.
"""

from typing import Annotated

from tqdm import tqdm

from data_tools.corpus.corpus import Corpus, CorpusPaths, shard_prefix
from data_tools.corpus.corpus_writer import CorpusWriter, append_file, check_output, smallest_vocab_size
from data_tools.corpus.joining import (
    check_same_job,
    merge_manifests,
    missing_manifests,
    open_corpora,
    refuse_input_as_output,
)
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_file, refuse_existing
from moelpr.base.settings import Count, Flags, either, metavar, run_script
from moelpr.data.language_bits import loss_bits_path
from moelpr.data.manifest import manifest_path
from moelpr.data.text.held_out_text import joined_text

_INPUTS = either("inputs", required=True)


class Settings(Flags):
    output_prefix: Annotated[str, metavar("P")]  # write P.bin, P.idx and P.lang
    num_shards: Annotated[Count | None, _INPUTS] = None  # join the N shards of P
    input: Annotated[list[str], _INPUTS, metavar("PREFIX")] = []  # join these corpora, in this order
    remove_input: bool = False  # delete inputs after a successful merge
    overwrite: bool = False  # replace an existing corpus P

    def __post_init__(self) -> None:
        refuse_input_as_output(self.input, self.output_prefix)


def main(arguments: Settings) -> None:
    output_prefix, overwrite, num_shards = arguments.output_prefix, arguments.overwrite, arguments.num_shards
    prefixes = arguments.input or [shard_prefix(output_prefix, i, num_shards or 0) for i in range(num_shards or 0)]
    for prefix in prefixes:
        Corpus(prefix)  # a missing input is reported before an existing output
    check_output(output_prefix, overwrite)
    texts, joined = joined_text(prefixes, output_prefix)
    if texts:
        refuse_existing([joined], overwrite)
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
        if texts:
            with atomic_file(joined) as temporary, open(temporary, "wb") as target:
                for text in texts:
                    append_file(text, target)
        writer.commit(merge_manifests(manifests, files) if manifests else None)
    print(writer)
    if texts:
        print(f"{joined}: its text as JSON lines")
    if manifests is None:
        print(missing_manifests(corpora, output_prefix))
    if arguments.remove_input:
        for prefix in prefixes:
            for path in (*CorpusPaths.of(prefix), loss_bits_path(prefix), manifest_path(prefix)):
                path.unlink(missing_ok=True)
        for path in texts:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_script(main)
