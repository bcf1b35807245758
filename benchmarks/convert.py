"""Time and memory of the converters, against copying the bytes they write, at two model sizes.

    python -m benchmarks.convert [--layers 12 36] [--rounds 3] [--folder DIR]

A random Llama in bf16 is generated, upcycled with 3 new experts into a Megatron checkpoint and exported as Mixtral. The
peer of each is `cp` of what it wrote, fsynced file by file, in the same round and on the same disk, with the files it
reads dropped from the page cache before. Peak memory is the process's, with Python, PyTorch and transformers; the bound
is 3 times the largest tensor + 500 MB. All of it is also the dense model's way there and back, which must end in the
same bytes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkpoint_convert.comparison import max_abs_difference
from checkpoint_convert.hf_folder import HfReader, HfWriter

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def generate(folder: Path, num_layers: int) -> None:
    """A random dense model of `num_layers` layers, in shards of 1 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": num_layers}))
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": num_layers}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    torch.manual_seed(0)
    with HfWriter(folder, tensors, torch.bfloat16, max_shard_bytes=10**9) as writer:
        for name, shape in tensors:
            writer.write(name, torch.randn(shape, dtype=torch.bfloat16))
        writer.finish()


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# A process's peak memory counts what its parent had when it was started, so the parent has to be a small one.
_SMALL_PARENT = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a process."""
    started = time.monotonic()
    wrapped = [sys.executable, "-S", "-c", _SMALL_PARENT, *command]
    code, peak = json.loads(subprocess.run(wrapped, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    if code != 0:
        raise SystemExit(f"{' '.join(command)} failed with code {code}")
    return time.monotonic() - started, peak


def copy_seconds(source: Path, target: Path) -> float:
    """`cp` and fsync of every file, as the converters do it."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    elapsed = time.monotonic() - started
    shutil.rmtree(target)
    return elapsed


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, num_layers: int, rounds: int) -> list[dict]:
    dense = folder / "dense"
    generate(dense, num_layers)
    reader = HfReader(dense)
    largest = max(map(reader.nbytes, reader.names))
    convert = [sys.executable, "-m"]
    steps = {
        "upcycle": (dense, ["checkpoint_convert.hf_to_mcore", "--hf-path", "dense", "--num-new-experts", "3"]),
        "export MoE": (folder / "upcycle", ["checkpoint_convert.mcore_to_hf", "--load", "upcycle"]),
        "import dense": (dense, ["checkpoint_convert.hf_to_mcore", "--hf-path", "dense", "--dense"]),
        "export dense": (folder / "import dense", ["checkpoint_convert.mcore_to_hf", "--load", "import dense"]),
    }
    rows = []
    for name, (source, words) in steps.items():
        module, flag, path, *others = words
        target = folder / name
        command = [*convert, module, flag, str(folder / path), *others, "--save", str(target)]
        seconds, copies, peaks = [], [], []
        for _ in range(rounds):
            shutil.rmtree(target, ignore_errors=True)
            drop_from_page_cache(source)
            elapsed, peak = timed(command)
            drop_from_page_cache(target)
            copies.append(copy_seconds(target, folder / "copy"))
            seconds.append(elapsed)
            peaks.append(peak)
        ratios = [ours / copy for ours, copy in zip(seconds, copies, strict=True)]
        rows.append(
            {
                "step": name,
                "layers": num_layers,
                "bytes_read": size_of(source),
                "bytes_written": size_of(target),
                "seconds": statistics.median(seconds),
                "copy_seconds": statistics.median(copies),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_bytes": max(peaks),
                "bound_bytes": 3 * largest + 500 * MB,
            }
        )
        print(as_line(rows[-1]), flush=True)
    difference = max_abs_difference(dense, folder / "export dense")
    print(f"dense model, there and back: largest difference {difference}")
    if difference != 0:
        raise SystemExit("the round trip is not exact")
    return rows


HEADER = (
    f"{'step':<14}{'layers':>7}{'read MB':>9}{'written MB':>12}{'s':>8}{'cp s':>8}{'ratio':>7}{'(min to max)':>16}"
    f"{'peak MB':>9}{'bound MB':>10}"
)


def as_line(row: dict) -> str:
    spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
    return (
        f"{row['step']:<14}{row['layers']:>7}{row['bytes_read'] / MB:>9.0f}{row['bytes_written'] / MB:>12.0f}"
        f"{row['seconds']:>8.1f}{row['copy_seconds']:>8.1f}{row['ratio']:>7.2f}{spread:>16}"
        f"{row['peak_bytes'] / MB:>9.0f}{row['bound_bytes'] / MB:>10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24], help="sizes of the model (default: 8 24)")
    parser.add_argument("--rounds", type=int, default=3, help="times each conversion is run (default: 3)")
    parser.add_argument(
        "--folder", type=Path, help="where to work, about 10 GB (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    print(HEADER)
    rows = []
    for num_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure(Path(folder), num_layers, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
