"""The right results of changed inputs, computed without the code under test."""

import bz2
import gzip
import json
import re
from pathlib import Path
from typing import Any

from tests.faults.commands import Judge, same_corpus, same_print


def right_text(file: str) -> Judge:
    """The corpus has the lines of the file as Python's json reads them."""

    def is_right(box: Path, other: Path) -> bool:
        content = (box / file).read_bytes()
        # Another archive of the same lines: readers don't go by the name. Parquet has checksums, and no second reader.
        archives = [archive.read_bytes() for archive in (other / "text").glob("text.*")]
        if content in archives or content.startswith(b"PAR1"):
            return same_corpus(box, other)
        rows = documents(box / file)
        if rows is None or not all(isinstance(language, str) for _, language in rows):
            return False  # it should have been refused
        return corpus(box) == expected_corpus(box, rows)

    return is_right


def right_scores(box: Path, other: Path) -> bool:
    """An evaluation of the same texts prints the same; that of other texts has no known result."""
    files = [box / f"text/{name}.jsonl" for name in ("en", "el")]
    if any(file.read_bytes().startswith(b"PAR1") for file in files if file.is_file()):
        return True  # the evaluation reads it by its content, and the material's Parquet file is other text
    now, before = ([documents(folder / f"text/{name}.jsonl") for name in ("en", "el")] for folder in (box, other))
    if None in now:
        return False  # it should have been refused
    texts_now, texts_before = ([[text for text, _ in rows or []] for rows in files] for files in (now, before))
    return texts_now != texts_before or same_print(box, other)


def right_tokens(box: Path, other: Path) -> bool:
    """The corpus has the tokens that transformers finds in its text, one at a time."""
    return corpus(box) == expected_corpus(box, documents(box / "text/text.jsonl") or [])


def expected_corpus(box: Path, rows: list[tuple[str, Any]]) -> list[tuple[list[int], bool]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(box / "hf")
    documents = [(tokenizer(text)["input_ids"], language == "en") for text, language in rows]
    # One without tokens gets no end token, as in Megatron, and so no bit.
    return [([*ids, tokenizer.eos_token_id], bit) if ids else ([], False) for ids, bit in documents]


def corpus(box: Path) -> list[tuple[list[int], bool]]:
    """Token IDs and the language bit of each document in out/a_text_document."""
    from data_tools.corpus.corpus import Corpus

    written = Corpus(box / "out/a_text_document")
    rows = (written.document(index) for index in range(written.num_documents))
    return [(ids.tolist(), bool(bits[:1].any())) for ids, bits in rows]


def documents(path: Path) -> list[tuple[str, Any]] | None:
    """(text, language or None) of each line; None if a line is not a document."""
    try:
        rows = [json.loads(line.decode("utf-8-sig")) for line in _unpacked(path).split(b"\n") if line.strip()]
        pairs = [(row["text"], row.get("lang")) for row in rows]
        "".join(text for text, _ in pairs).encode()
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return pairs


def _unpacked(path: Path) -> bytes:
    import pyarrow

    def unpack_zstd(content: bytes) -> bytes:
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()

    content = path.read_bytes()
    forms = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\x28\xb5\x2f\xfd": unpack_zstd}
    return next((unpack for start, unpack in forms.items() if content.startswith(start)), bytes)(content)


# Settings that follow from others: Megatron's and the trainer's arithmetic.
_DERIVED = set("moe_aux_loss_coeff lr_decay_iters lr_warmup_iters min_lr save_retain_interval".split())
_DERIVED |= {"encoder_seq_length", "eval_global_batch_size", "eval_micro_batch_size"}


def recipe_holds(box: Path, other: Path) -> bool:
    """Every key of the recipe, as PyYAML reads it, has its value in the settings, and no other setting has changed.

    What follows from the recipe's values is not compared (`_DERIVED`).
    """
    import yaml

    recipe, before = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (box, other))
    read = yaml.load((box / "recipe.yaml").read_text(), yaml.BaseLoader)  # 0123 is 123, not YAML's octal 83
    recipe |= {key: int(read[key]) for key in recipe.keys() & read.keys() if re.fullmatch("0[0-7]+", str(read[key]))}
    settings, undisturbed = (yaml.safe_load((folder / "out/settings.yaml").read_text()) for folder in (box, other))

    def is_set(key: str, value: Any) -> bool:
        if (name := key.replace("-", "_")) not in settings:
            return False
        actual = settings[name]
        if value is None or value is False:
            return actual is not True  # as if the recipe did not have the key
        if isinstance(value, list):
            items = actual if isinstance(actual, list) else [actual]
            return [str(item) for item in items] == [str(item) for item in value]
        return actual == value or str(actual) == str(value) or (isinstance(actual, float) and actual == float(value))

    if not all(is_set(str(key), value) for key, value in recipe.items()):
        return False
    if recipe.keys() != before.keys() or any(type(recipe[key]) is not type(before[key]) for key in recipe):
        return True  # other settings may follow from a key that is new or gone
    others = (settings.keys() | undisturbed.keys()) - {str(key).replace("-", "_") for key in recipe} - _DERIVED
    return all(settings.get(name) == undisturbed.get(name) for name in others)
