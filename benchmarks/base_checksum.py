"""How fast is a base checkpoint's checksum, which a run with --save-trained-only verifies when it resumes?

    python -m benchmarks.base_checksum [--gib 1] [--folder DIR]

Writes a file of random bytes, hashes it as a step folder and with Python's hashlib alone, and prints JSON. The file was
just written, so it is read from memory where there is enough: a disk or network slower than that sets the pace itself.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moelpr.checkpoints import checksum


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write it for the time being (default: the system's own)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        step = Path(name) / "run" / "iter_0000001"
        step.mkdir(parents=True)
        file = step / "__0_0.distcp"
        block = os.urandom(1 << 24)
        with open(file, "wb") as out:
            for _ in range(round(args.gib * 2**30 / len(block))):
                out.write(block)
        num_bytes = file.stat().st_size
        plain = num_bytes / _seconds(lambda: _plain_sha256(file))
        ours = num_bytes / _seconds(lambda: checksum(step))
    found = {"checksum_gb_per_s": ours / 1e9, "one_thread_sha256_gb_per_s": plain / 1e9, "ratio": ours / plain}
    print(json.dumps({"gib": args.gib, "cores": os.cpu_count(), **{key: round(x, 2) for key, x in found.items()}}))


def _plain_sha256(file: Path) -> None:
    with open(file, "rb") as stream:
        hashlib.file_digest(stream, "sha256")


def _seconds(work: Callable[[], None | str]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
