"""How many bytes of UTF-8 a corpus's tokens stand for, so that losses can be told in bits per byte."""

from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from moelpr.data.manifest import Manifest
from moelpr.data.tokenizer import load_tokenizer
from moelpr.errors import UserError
from moelpr.run_folder import HF_FOLDER

MAX_TOKENS = 1_000_000  # that are decoded where no manifest has the count: two seconds


def bytes_per_token(prefix: str, model_folder: str) -> float | None:
    """From the corpus's manifest; without one, by decoding its first tokens with the tokenizer in `<model>/hf`.

    None where neither is there. Tokens that end a document stand for no bytes, but they are predicted, so they count.
    """
    return _of_manifest(prefix) or _of_decoded(prefix, Path(model_folder) / HF_FOLDER)


def _of_manifest(prefix: str) -> float | None:
    manifest = Manifest.read(prefix)
    if manifest is None or not manifest.tokens:
        return None
    return sum(count.bytes for count in manifest.languages.values()) / manifest.tokens


def _of_decoded(prefix: str, tokenizer_folder: Path) -> float | None:
    try:
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder))
    except UserError:
        return None
    corpus = IndexedDataset(prefix)
    num_tokens = num_bytes = 0
    for document in range(len(corpus)):
        ids = corpus.get(document).tolist()
        num_tokens += len(ids)
        text = tokenizer.decode([token for token in ids if token != tokenizer.eod_id])
        num_bytes += len(text.encode("utf-8", errors="replace"))
        if num_tokens >= MAX_TOKENS:
            break
    # Of a folder without a tokenizer, transformers makes an empty one, which decodes everything to nothing.
    return num_bytes / num_tokens if num_bytes else None
