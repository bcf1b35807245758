"""The reader printed in docs/data-format.md reads what the project writes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelpr.data.language_bits import LanguageBitsWriter

DOCUMENT = Path(__file__).parents[3] / "docs" / "data-format.md"


@pytest.fixture
def read_language_bits() -> Callable[[Path], list[int]]:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_language_bits"]


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 1003])
def test_the_documented_reader_reads_our_files(
    num_tokens: int, read_language_bits: Callable[[Path], list[int]], tmp_path: Path
) -> None:
    bits = np.random.default_rng(num_tokens).integers(0, 2, num_tokens, dtype=np.uint8)
    with LanguageBitsWriter(tmp_path / "a.lang") as writer:
        writer.append(bits)
        writer.finalize()
    assert read_language_bits(tmp_path / "a.lang") == bits.tolist()
    if num_tokens:
        content = bytearray((tmp_path / "a.lang").read_bytes())
        content[-1] ^= 1
        (tmp_path / "a.lang").write_bytes(content)
        with pytest.raises(AssertionError):
            read_language_bits(tmp_path / "a.lang")
