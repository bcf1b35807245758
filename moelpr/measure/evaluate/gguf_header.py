"""The header of a GGUF file, of which llama.cpp aborts the process for numbers that it can't have."""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from moelpr.base.errors import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Key without the architecture -> the least and the most that llama.cpp has room for.
_RANGES = {"block_count": (1, 512), "expert_count": (0, 512), "expert_used_count": (0, 512)}


def check_header(path: Path) -> None:
    """Raise a UserError if a file is no GGUF, or has more layers or experts than llama.cpp can compute."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            numbers = dict(_numbers(content))
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged or no GGUF ({error}); write it again with moelpr model gguf") from error
    for name, (least, most) in _RANGES.items():
        if not least <= numbers.get(name, least) <= most:
            raise UserError(
                f"{path} has {name} {numbers[name]}, and llama.cpp computes {least} to {most}; write it again"
            )
    if numbers.get("expert_used_count", 0) > numbers.get("expert_count", 0):
        raise UserError(f"{path} uses more experts than it has; write it again with moelpr model gguf")


def _numbers(content: mmap.mmap) -> Iterator[tuple[str, int]]:
    """The values of `_RANGES`."""
    magic, version, _, count = struct.unpack_from("<4sIQQ", content)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("its first bytes are others")
    place = struct.calcsize("<4sIQQ")
    for _ in range(count):
        key, place = _string(content, place)
        (kind,) = struct.unpack_from("<I", content, place)
        place += 4
        name = key.decode(errors="replace").rpartition(".")[2]
        if name in _RANGES:
            value = struct.unpack_from(f"<{_NUMBERS.get(kind, 'x')}", content, place)
            yield name, int(value[0]) if value else -1
        place = _end(content, place, kind)


def _string(content: mmap.mmap, place: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", content, place)
    end = place + 8 + length
    if end > len(content):
        raise ValueError("it is truncated")
    return content[place + 8 : end], end


def _end(content: mmap.mmap, place: int, kind: int) -> int:
    """Where a value ends that starts at a place."""
    if kind == _STRING:
        return _string(content, place)[1]
    if kind != _ARRAY:
        if kind not in _NUMBERS:
            raise ValueError(f"it has values of the unknown type {kind}")
        return place + struct.calcsize(_NUMBERS[kind])
    of, count = struct.unpack_from("<IQ", content, place)
    place += 12
    if of in _NUMBERS:
        return place + count * struct.calcsize(_NUMBERS[of])
    if of != _STRING:
        raise ValueError("it has nested arrays")
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, place)
        place += 8 + length
    return place
