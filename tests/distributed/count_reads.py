"""tests.distributed.train_many, which counts the bytes of checkpoints that the ranks read; run under torchrun.

    python -m moelpr.torchrun --standalone --nproc-per-node 2 -m tests.distributed.count_reads FILE

Each rank writes the bytes of each file to FILE's name with its number and `.reads` appended.
"""

import builtins
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.distributed import train_many

_read: Counter[str] = Counter()
_open = open


class _Counted(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        number = super().readinto(buffer)
        _read[str(self.name)] += number or 0
        return number

    def readall(self) -> bytes:
        content = super().readall()
        _read[str(self.name)] += len(content)
        return content


def _counting_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
    if mode == "rb" and str(file).endswith((".distcp", ".metadata")):
        raw = _Counted(file)
        return raw if buffering == 0 else io.BufferedReader(raw)
    return _open(file, mode, buffering, *args, **options)


if __name__ == "__main__":
    builtins.open = io.open = _counting_open  # type: ignore[assignment]
    train_many.main()
    Path(f"{sys.argv[1]}.{os.environ['RANK']}.reads").write_text(json.dumps(_read))
