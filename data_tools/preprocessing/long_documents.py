"""A document too long for memory, from its line to a file of its tokens; lives in the workers."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import mkstemp

import numpy as np

from data_tools.corpus_writer import Documents, TokensAt, as_tokens
from data_tools.preprocessing.encoder import EncodedBatch, Encoder
from data_tools.preprocessing.languages import UNDETECTED, LanguageSpans, TaggedText
from data_tools.preprocessing.long_lines import LongString, without_long_strings
from data_tools.preprocessing.long_texts import encode_long_text
from data_tools.preprocessing.readers import Batch, LinesAt
from data_tools.preprocessing.tally import Tally
from moelpr.documents import BadLine, parse


def encode_long_line(encoder: Encoder, batch: Batch, spool: Path) -> EncodedBatch:
    """Encode a batch that is a single long line, in the memory that a piece of it takes.

    Args:
        spool: a folder for the tokens.

    Raises:
        UserError: the line can't be used, unless bad lines are skipped.
    """
    assert isinstance(batch.content, LinesAt)
    tally = Tally()
    documents: dict[str, Documents] = {}
    problems: list[str] = []
    try:
        line, strings = without_long_strings(batch.content)
        if line.strip():
            tally.num_read = 1
            documents = _documents(encoder, line, strings, batch, tally, spool)
    except BadLine as error:
        tally = Tally(num_read=1, num_skipped=1, problems=[encoder.problem(batch, 0, error)])
        problems = tally.problems
    if batch.content.is_temporary:
        os.unlink(batch.content.path)
    return EncodedBatch(documents, tally, batch.after, batch.num_bytes, batch.file_bytes, problems)


def _documents(
    encoder: Encoder, line: bytes, strings: dict[str, LongString], batch: Batch, tally: Tally, spool: Path
) -> dict[str, Documents]:
    source = batch.share.source
    keys = encoder.keys[source.dataset]
    document = parse(line, [*keys, *encoder.tagger.columns()])
    if isinstance(encoder.tagger, LanguageSpans) and strings:
        raise BadLine("a span of more than a million bytes in a long line; split it")
    texts = [strings.get(value) if isinstance(value := document.get(key), str) else None for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if text is not None:
            document[key] = next(text.parts())  # its first part stands for it, where its language is looked for
    found = encoder.tagger.texts(document, source.dataset, keys)
    if any(text is not None and len(tagged.spans) > 1 for text, tagged in zip(texts, found, strict=True)):
        raise BadLine("a long text can't have a language for each of its lines; split it")
    if encoder.skips_undetected and any(name == UNDETECTED for tagged in found for name, _ in tagged.spans):
        tally.num_undetected = 1
        return {}
    suffix = encoder.part(texts[0].parts() if texts[0] else [found[0].text])
    encoder.audit(found[0], tally)
    documents: dict[str, Documents] = {}
    for corpus, text, tagged in zip(encoder.corpora, texts, found, strict=True):
        name = corpus + suffix
        if text is None:
            documents[name] = encoder.documents([encoder.prepared(tagged)], name, tally)
        else:
            documents[name] = _long_document(encoder, text, tagged, name, tally, spool)
        tally.corpus(name).sources[source.path] += 1
    return documents


def _long_document(
    encoder: Encoder, text: LongString, tagged: TaggedText, name: str, tally: Tally, spool: Path
) -> Documents:
    language = tagged.spans[0][0]
    descriptor, temporary = mkstemp(prefix="tokens-", dir=spool)
    path = Path(temporary)
    num_bytes = num_tokens = 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for part in text.parts():
            num_bytes += len(part.encode())
            yield part

    behind = [*encoder.suffix, *([] if encoder.eod_id is None else [encoder.eod_id])]
    try:
        with open(descriptor, "wb") as file:
            pieces = (piece.ids for piece in encode_long_text(encoder.backend, counted()))
            for ids in chain([np.array(encoder.prefix, np.int32)], pieces, [np.array(behind, np.int32)]):
                file.write(as_tokens(ids, encoder.vocab_size).tobytes())
                num_tokens += len(ids)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    count = tally.corpus(name).count(language, encoder.bits)
    count.documents, count.tokens, count.bytes = 1, num_tokens, num_bytes
    length = np.array([num_tokens], np.int64)
    bit = np.array([language in encoder.bits.original], np.uint8)
    return Documents(TokensAt(path, num_tokens), length, bit, length)
