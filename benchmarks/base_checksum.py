"""How fast is the checksum of a base checkpoint, which a run with --save-trained-only verifies when it resumes?

    python -m benchmarks.base_checksum [--gib 1] [--folder DIR]

Writes a file of random bytes, hashes it as a step folder and with hashlib's SHA-256 in one thread (the baseline), and
prints JSON. The file was just written, so it is read from memory if memory suffices; a slower disk is the limit then.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from benchmarks.common import argument_parser
from benchmarks.timing import timed_s
from moelpr.checkpoints import checksum


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gib", type=float, default=1, help="size of the checkpoint, in GiB")
    parser.add_argument("--folder", type=Path, help="where to write it temporarily (default: the system's choice)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        step = Path(folder, "run", "iter_0000001")
        step.mkdir(parents=True)
        file = step / "__0_0.distcp"
        block = os.urandom(1 << 24)
        with open(file, "wb") as out:
            for _ in range(round(args.gib * 2**30 / len(block))):
                out.write(block)
        gigabytes = file.stat().st_size / 1e9
        with open(file, "rb") as stream:
            baseline = gigabytes / timed_s(lambda: hashlib.file_digest(stream, "sha256"))[0]
        ours = gigabytes / timed_s(lambda: checksum(step))[0]
    rates = {"checksum_gb_per_s": ours, "one_thread_sha256_gb_per_s": baseline, "ratio": ours / baseline}
    print(json.dumps({"gib": args.gib, "cores": os.cpu_count(), **{key: round(x, 2) for key, x in rates.items()}}))


if __name__ == "__main__":
    main()
