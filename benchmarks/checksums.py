"""How fast are the checksums of a checkpoint, which are verified before it is loaded?

    python -m benchmarks.checksums [--gib 1] [--files 2] [--folder DIR]

Writes files of random bytes, verifies them as a step folder's, and compares with reading the same files in one thread
(the baseline); prints JSON. The files were just written, so they are read from memory if memory suffices; a slower disk
is the limit then.
"""

import json
import os
import tempfile
from pathlib import Path

from benchmarks.common import argument_parser
from benchmarks.timing import timed_s
from moelpr.checkpoints.chain import verify_files, write_checksums


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gib", type=float, default=1, help="size of the checkpoint, in GiB")
    parser.add_argument("--files", type=int, default=2, help="number of its files; each is read by one thread")
    parser.add_argument("--folder", type=Path, help="where to write it temporarily (default: the system's choice)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        step = Path(folder, "run", "iter_0000001")
        step.mkdir(parents=True)
        block = os.urandom(1 << 24)
        files = [step / f"__0_{number}.distcp" for number in range(args.files)]
        for file in files:
            with open(file, "wb") as out:
                for _ in range(round(args.gib * 2**30 / args.files / len(block))):
                    out.write(block)
        gigabytes = sum(file.stat().st_size for file in files) / 1e9
        reading = gigabytes / timed_s(lambda: [read(file) for file in files])[0]
        writing = gigabytes / timed_s(lambda: write_checksums(step))[0]
        verifying = gigabytes / timed_s(lambda: verify_files([step]))[0]
    rates = {"write_gb_per_s": writing, "verify_gb_per_s": verifying, "one_thread_read_gb_per_s": reading}
    rates["ratio"] = verifying / reading
    print(json.dumps({"gib": args.gib, "cores": os.cpu_count(), **{key: round(x, 2) for key, x in rates.items()}}))


def read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
