"""Headers that llama.cpp would abort for are refused before it reads them."""

import struct
from contextlib import nullcontext
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.llama_cpp import check_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(**numbers: int) -> bytes:
    """A GGUF of texts, an array of texts, an array of numbers, and numbers of an architecture after them."""
    pairs = [text("general.name") + struct.pack("<I", 8) + text("x")]
    pairs += [text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("") + text("bc")]
    pairs += [text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8)]
    pairs += [text(f"qwen2moe.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ({"block_count": 2, "expert_count": 4, "expert_used_count": 2}, None),
        ({"block_count": 2}, None),
        ({"block_count": 0}, "block_count 0"),
        ({"block_count": 1 << 31}, "block_count 2147483648"),
        ({"expert_count": (1 << 31) - 1}, "expert_count 2147483647"),
        ({"expert_count": 4, "expert_used_count": 999}, "expert_used_count 999"),
        *(({"expert_count": 4, "expert_used_count": used}, f"{used} of 4") for used in (0, 5)),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, numbers: dict[str, int], wrong: str | None) -> None:
    (tmp_path / "x.gguf").write_bytes(header(**numbers))
    with pytest.raises(UserError, match=wrong) if wrong else nullcontext():
        check_header(tmp_path / "x.gguf")
