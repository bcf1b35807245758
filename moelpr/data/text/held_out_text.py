"""The text of held-out corpora as JSON lines for `moelpr.measure.evaluate`: where it is, and how several become one."""

import re
from collections.abc import Sequence
from pathlib import Path

_CORPUS = re.compile(r"(?P<stem>.*_validation)_(?P<key>.+)_document(?P<shard>(\.shard-\d+-of-\d+)?)", re.DOTALL)


def text_paths(prefix: str) -> list[Path]:
    """Return where the text of a held-out corpus may be: named after its key, or after none if its job read one key."""
    if not (match := _CORPUS.fullmatch(prefix)):
        return []
    stem, key, shard = match["stem"], match["key"], match["shard"]
    return [Path(f"{stem}_{key}{shard}.jsonl"), Path(f"{stem}{shard}.jsonl")]


def is_held_out_text(path: Path) -> bool:
    """Whether a file is the text of a held-out corpus that lies next to it."""
    if "_validation" not in path.name or path.suffix != ".jsonl":
        return False
    return any(path in text_paths(str(index.with_suffix(""))) for index in path.parent.glob("*_validation_*.idx"))


def joined_text(prefixes: Sequence[str], output_prefix: str) -> tuple[list[Path], Path]:
    """Return the texts of held-out corpora, and the file for their concatenation; no texts if a corpus has none."""
    for *parts, joined in zip(*map(text_paths, (*prefixes, output_prefix)), strict=False):
        if all(part.is_file() for part in parts):
            return parts, joined
    return [], Path()
