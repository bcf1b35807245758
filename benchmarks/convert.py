"""Time and memory of the converters, against copying the bytes they write, at two model sizes.

    python -m benchmarks.convert [--layers 8 24] [--rounds 3] [--folder DIR] [--json FILE]

A random Llama in bf16 is upcycled with 3 new experts into a Megatron checkpoint and exported as Mixtral; it is also
imported and exported as a dense model, which must reproduce its tensors exactly. The baseline of each conversion is
`cp` of what it wrote, fsynced file by file, in the same round and on the same disk. Both start with their input dropped
from the page cache. Peak memory is that of the process, including Python, PyTorch and transformers; its limit is 3
times the largest tensor + 500 MB.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_json, argument_parser, print_table, save_random_model, write_json
from benchmarks.timing import Times, median_s
from moelpr.base.files import fsync_file

SHAPE: dict[str, Any] = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=32)
SHAPE |= dict(num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16")
LIMIT_BYTES = 3 * 32000 * 2048 * 2 + 500 * 10**6  # the embedding is the largest tensor

# The peak memory of a process includes its parent's at the fork, so the parent has to be small.
_SMALL_PARENT = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24], help="numbers of layers of the models")
    parser.add_argument("--folder", type=Path, help="where to work, about 10 GB (default: the system's choice)")
    add_json(parser)
    args = parser.parse_args()
    rows = []
    for num_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure(Path(folder), num_layers, args.rounds)
    print_table(rows)
    write_json(rows, args.json)


def measure(folder: Path, num_layers: int, rounds: int) -> list[dict]:
    """Results of each conversion; exits if the dense model is not reproduced."""
    from transformers import LlamaConfig

    dense = save_random_model(LlamaConfig(num_hidden_layers=num_layers, **SHAPE), folder / "dense")
    steps = {
        "upcycle": ("dense", "model convert --num-new-experts 3 --hf-path"),
        "export MoE": ("upcycle", "model export --load"),
        "import dense": ("dense", "model convert --dense --hf-path"),
        "export dense": ("import dense", "model export --load"),
    }
    rows = []
    for name, (source_name, command) in steps.items():
        source, target, copied = folder / source_name, folder / name, folder / "copy"
        times: Times = {"convert": [], "copy": []}
        peaks = []
        for _ in range(rounds):
            shutil.rmtree(target, ignore_errors=True)
            drop_from_page_cache(source)
            seconds, peak = run(*command.split(), str(source), "--save", str(target))
            drop_from_page_cache(target)
            times["convert"].append(seconds)
            times["copy"].append(copy_s(target, copied))
            peaks.append(peak)
            shutil.rmtree(copied)
        ratios, seconds_of = [ours / copy for ours, copy in zip(*times.values(), strict=True)], median_s(times)
        rows.append(
            {
                "step": name,
                "layers": num_layers,
                "bytes_read": sum(path.stat().st_size for path in files_of(source)),
                "bytes_written": sum(path.stat().st_size for path in files_of(target)),
                "seconds": seconds_of["convert"],
                "copy_seconds": seconds_of["copy"],
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_bytes": max(peaks),
                "bound_bytes": LIMIT_BYTES,
            }
        )
    run("model", "verify", str(dense), str(folder / "export dense"))
    return rows


def run(*words: str) -> tuple[float, int]:
    """Run a subcommand; (seconds, peak memory in bytes) of its process. Exits if it fails."""
    command = [sys.executable, "-S", "-c", _SMALL_PARENT, sys.executable, "-m", "moelpr", *words]
    started = time.perf_counter()
    code, peak = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    if code != 0:
        sys.exit(f"{' '.join(words)} failed with code {code}")
    return time.perf_counter() - started, peak


def copy_s(source: Path, target: Path) -> float:
    """Seconds for `cp` and fsync of every file, as the converters do it."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in files_of(target):
        fsync_file(path)
    return time.perf_counter() - started


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


if __name__ == "__main__":
    main()
