"""First contact with a machine: GPU tests, benchmarks, and the trainer against the planner, on all GPUs.

    python -m benchmarks.first_contact [--output DIR] [--parts PART …] [--dry-run [--ranks N]]

or launch/first_contact.sh, which also works in the container. Runs these parts one after the other, each with a time
limit and in processes of its own, so that one that fails or hangs costs only its own line:

- tests/gpu;
- the trainer, with random weights and text, on all GPUs: a model of Qwen1.5-1.8B's shape with 8 new experts and as
  many of its 24 layers as fit, in stage 1 with data parallelism alone and with expert parallelism, and in stage 2.
  Memory and tokens/s are compared with the planner's, the work that a step needs with the rate of a large product;
- the same runs without the GPU (`moelpr check`), whose memory, kernels and waits are compared with the measured ones;
- tests/gpu/test_launcher_cases.py: the launcher with many flags, which must not change the losses of a tiny model;
- benchmarks.train_step on one GPU, with random routing;
- benchmarks.expert_traffic on all GPUs, with random routing.

DIR gets log.md, the measured tables; results.json, all numbers and the end of what failed parts have printed, which is
the file to send to others; and the output of each part. The exit code is 1 if a part failed. With --dry-run everything
is tiny and on CPU ranks, and the numbers mean nothing.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from benchmarks import common
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.base.versions import installed_versions
from moelpr.measure.report.page import Table, markdown_table
from moelpr.model.checkpoints.chain import RELEASE
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.gpus import GIB, GPUS, Cluster, gpu_named, gpus_of_torch
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import CPU, Kernels, Workload, model_parts, stage_memories
from moelpr.plan.step_time import stage_flops, step_time
from moelpr.project.workflow.execution import execute

WARMUP_STEPS, STEPS = 2, 6  # the first ones compile kernels and allocate buffers
LIMITS_S = {"tests/gpu": 130, "trainer": 240, "dry_steps": 200, "cases": 600, "train_step": 110, "expert_traffic": 110}
CASES = "tests/gpu/test_launcher_cases.py"
USABLE = 0.9  # the share of a GPU's memory that a run may take


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run. `layers`: numbers to choose from, descending; the last two are options of the benchmarks."""

    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    layers: tuple[int, ...]
    new_experts: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    train_step: str
    expert_traffic: str


GPU_STEP = "--layers 3 --hidden 2048 --ffn 5504 --head 128 --vocabulary 32768 --sequences 8 --length 1024"
GPU_TRAFFIC = "--hidden 2048 --ffn 5504 --new-experts 8 --tokens 8192"
GPU_SIZES = Sizes(2048, 5504, 16, 151936, (24, 16, 12, 8, 6, 4, 3, 2), 8, 1024, 8, 4, GPU_STEP, GPU_TRAFFIC)
DRY_STEP = "--layers 2 --hidden 32 --ffn 64 --head 8 --vocabulary 256 --sequences 2 --length 16 --rounds 1"
DRY_TRAFFIC = "--hidden 32 --ffn 64 --new-experts 4 --tokens 64 --rounds 1"
DRY_SIZES = Sizes(32, 64, 4, 256, (2,), 4, 16, 2, 2, DRY_STEP, DRY_TRAFFIC)


@dataclass(frozen=True)
class Machine:
    """The GPUs of this machine, or the CPU ranks of a dry run."""

    name: str
    ranks: int
    memory_gib: float
    is_dry_run: bool = False

    @property
    def sizes(self) -> Sizes:
        return DRY_SIZES if self.is_dry_run else GPU_SIZES

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.ranks, self.ranks, self.memory_gib, 0, gpu_named(self.name, self.memory_gib))


@dataclass
class Part:
    """The outcome of a part; a failed one has the end of its `output`, and no results but those of tests."""

    name: str
    outcome: str
    seconds: float
    results: Any = None
    output: str = ""


@dataclass(frozen=True)
class TrainerRun:
    """A run of the trainer, with what the planner says about it: bytes, tokens/s per GPU (None if unknown)."""

    name: str
    layout: PlannedLayout
    workload: Workload
    planned_bytes: int
    predicted_tokens_per_s: float | None
    flops_per_token: float


def main() -> None:
    args = _parser().parse_args()
    machine, folder = find_machine(args), args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(common.ROOT)
    spec, runs = trainer_runs(machine)
    run: dict[str, Callable[[], Part]] = {
        "tests/gpu": lambda: run_tests("tests/gpu", ["tests/gpu", "--ignore", CASES], folder),
        "trainer": lambda: run_trainer(machine, runs, folder),
        "dry_steps": lambda: run_dry_steps(machine, folder),
        "cases": lambda: run_tests("cases", [CASES], folder),
        "train_step": lambda: run_benchmark("train_step", machine.sizes.train_step, folder),
        "expert_traffic": lambda: run_expert_traffic(machine, folder),
    }
    write_runs(machine, spec, runs, folder / "trainer")
    parts = [run[name]() if name in args.parts else Part(name, "not chosen", 0, {}) for name in run]
    text = as_markdown(machine, spec, runs, parts)
    write_text(folder / "log.md", text)
    everything = {"machine": vars(machine), "runs": [*map(asdict, runs)], "parts": [*map(vars, parts)]}
    write_text(folder / "results.json", json.dumps(everything, indent=2) + "\n")
    print(f"\n{text}\nwritten to {folder / 'log.md'}")
    sys.exit(int(any(part.results is None or part.output for part in parts)))


def find_machine(args: argparse.Namespace) -> Machine:
    if args.ranks is not None and (not args.dry_run or args.ranks < 1):
        raise UserError(f"--ranks is the number of CPU ranks of a --dry-run, at least 1, got {args.ranks}")
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the parts inherit it
        return Machine("CPU", args.ranks or 2, 0, is_dry_run=True)
    if not (gpus := gpus_of_torch()):
        from moelpr.model.megatron import cpu  # only now, as it imports torch

        why = "torch sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or try it with --dry-run"
        raise UserError(cpu.unusable_gpus() or why)
    names, sizes = zip(*gpus, strict=True)
    return Machine(" and ".join(sorted(set(names))), len(gpus), min(sizes))


def trainer_runs(machine: Machine) -> tuple[ModelSpec, list[TrainerRun]]:
    """The largest model that fits, and the trainer's runs.

    Raises:
        UserError: not even the smallest one fits.
    """
    sizes, dtype = machine.sizes, "float32" if machine.is_dry_run else "bfloat16"
    for layers in sizes.layers:
        config = common.qwen2_config(
            layers, sizes.hidden, sizes.ffn, sizes.vocabulary, sizes.seq_length, sizes.heads, sizes.heads
        )
        spec = common.model_spec(config, sizes.new_experts, dtype=dtype)
        runs = [_planned(machine, spec, name, *run) for name, run in _layouts(machine).items()]
        if machine.is_dry_run or max(run.planned_bytes for run in runs) <= USABLE * machine.memory_gib * GIB:
            return spec, runs
    raise UserError(
        f"{machine.name} has {machine.memory_gib:.0f} GiB, and the smallest model of this check needs "
        f"{max(run.planned_bytes for run in runs) / USABLE / GIB:.0f}; use GPUs with more memory"
    )


def _layouts(machine: Machine) -> dict[str, tuple[str, PlannedLayout]]:
    """Name → stage and layout of the trainer's runs."""
    ranks, ep = machine.ranks, math.gcd(machine.ranks, machine.sizes.new_experts)
    alone = PlannedLayout(dp=ranks, distributed_optimizer=ranks > 1)
    runs = {f"stage 1, DP {ranks}": ("stage1", alone), f"stage 2, DP {ranks}": ("stage2", alone)}
    if ep > 1:
        runs[f"stage 1, DP {ranks}, EP {ep}"] = ("stage1", PlannedLayout(ep=ep, dp=ranks))
    return dict(sorted(runs.items()))


def _planned(machine: Machine, spec: ModelSpec, name: str, stage: Any, layout: PlannedLayout) -> TrainerRun:
    sizes, parts = machine.sizes, model_parts(spec)
    batch = sizes.micro_batch_size * sizes.micro_batches * machine.ranks
    dtype: Any
    kernels, dtype = (CPU, "fp32") if machine.is_dry_run else (Kernels(), "bf16")
    workload = Workload(stage, sizes.seq_length, sizes.micro_batch_size, batch, dtype, kernels)
    memories = stage_memories(spec, parts, layout, workload)
    tokens_per_s = None
    if machine.cluster.gpu:
        predicted = step_time(spec, parts, layout, workload, machine.cluster, memories)
        tokens_per_s = predicted.tokens_per_s(workload, machine.cluster)
    flops = stage_flops(spec, parts, layout, workload, 0).once / (sizes.seq_length * sizes.micro_batch_size)
    return TrainerRun(name, layout, workload, memories[0].total_bytes, tokens_per_s, flops)


def run_tests(name: str, files: list[str], folder: Path) -> Part:
    """`results`: a row for each test, also if one fails: its name, ranks, seconds, difference of losses, outcome."""
    report = folder / f"{name.replace('/', '-')}.xml"
    report.unlink(missing_ok=True)
    part = run_part(name, ["pytest", *files, "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"], folder, list)
    for test in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        noted = {one.attrib["name"]: one.attrib["value"] for one in test.iter("property")}
        outcome = next((one.tag for one in test if one.tag in ("failure", "error", "skipped")), "passed")
        row = [test.attrib["name"], noted.get("ranks", "–"), test.attrib["time"], noted.get("difference", "–"), outcome]
        part.results = [*(part.results or []), row]
    return part


def write_runs(machine: Machine, spec: ModelSpec, runs: list[TrainerRun], work: Path) -> None:
    """Write what the trainer's runs need: a checkpoint without weights, text, and their arguments."""
    shutil.rmtree(work, ignore_errors=True)  # an earlier check may have left it
    (work / "checkpoint" / RELEASE).mkdir(parents=True, exist_ok=True)
    (work / "checkpoint" / TRACKER_FILE).write_text(RELEASE)
    spec.write(work / "checkpoint")
    random = np.random.default_rng(0)
    vocabulary, length = machine.sizes.vocabulary, machine.sizes.seq_length
    documents = ((random.integers(0, vocabulary, length), number % 2 == 0) for number in range(256))
    common.write_corpus(work / "text", vocabulary, documents)
    write_text(work / "runs.json", json.dumps({run.name: _arguments(run, work) for run in runs}))


def run_trainer(machine: Machine, runs: list[TrainerRun], folder: Path) -> Part:
    """`results`: name → `_measured`, and matmul_flops of each GPU."""
    work = folder / "trainer"
    words = f"moelpr.torchrun --standalone --nproc-per-node {machine.ranks} -m benchmarks.trainer_steps".split()

    def read() -> dict[str, Any]:
        ranks = [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(machine.ranks)]
        rates = [rank["matmul_flops"] for rank in ranks]
        return {"matmul_flops": rates, **{run.name: _measured(run, ranks[-1], min(rates)) for run in runs}}

    return run_part("trainer", [*words, str(work)], folder, read)


def _arguments(run: TrainerRun, work: Path) -> list[str]:
    load, steps = run.workload, WARMUP_STEPS + STEPS
    words = (
        f"--stage {load.stage} --{load.dtype} --micro-batch-size {load.micro_batch_size} --global-batch-size "
        f"{load.global_batch_size} --seq-length {load.seq_length} --lr 1e-5 --train-iters {steps} "
        "--no-save-optim"  # nothing is saved, but torch's Adam requires it with the distributed optimizer
    ).split()
    if run.layout.distributed_optimizer:
        words += ["--overlap-grad-reduce", "--overlap-param-gather"]  # as in the recipes
    paths = ["--pretrained-checkpoint", str(work / "checkpoint"), "--data-path", str(work / "text")]
    return [*words, *paths, *run.layout.flags()]


def _measured(run: TrainerRun, last_rank: dict[str, Any], matmul_flops: float) -> dict[str, float]:
    """tokens_per_s (per GPU), memory_gib, share_of_matmul_rate; and on a GPU kernels and waits of the last step."""
    measured = last_rank["runs"][run.name]
    tokens_per_s = statistics.median(step["tokens_per_s"] for step in measured["steps"][WARMUP_STEPS:])
    tokens_per_s /= run.layout.world_size
    return {
        "tokens_per_s": tokens_per_s,
        "memory_gib": measured["steps"][-1]["peak_memory_gib"] - measured["held_gib"],
        "share_of_matmul_rate": tokens_per_s * run.flops_per_token / matmul_flops,
        **{name: measured["steps"][-1][name] for name in ("kernels", "waits") if name in measured["steps"][-1]},
    }


def run_dry_steps(machine: Machine, folder: Path) -> Part:
    """`results`: name → memory_gib, kernels and waits."""
    work = folder / "trainer"
    gpu = next((name for name, gpu in GPUS.items() if gpu == machine.cluster.gpu), "h100-80")
    words = ["benchmarks.dry_steps", str(work), gpu, str(machine.ranks)]
    return run_part("dry_steps", words, folder, lambda: json.loads((work / "dry.json").read_text()))


def run_benchmark(name: str, options: str, folder: Path) -> Part:
    report = folder / f"{name}.json"
    words = [f"benchmarks.{name}", *options.split(), "--json", str(report)]
    return run_part(name, words, folder, lambda: json.loads(report.read_text()))


def run_expert_traffic(machine: Machine, folder: Path) -> Part:
    ep = math.gcd(machine.ranks, machine.sizes.new_experts)
    if ep == 1:
        return Part("expert_traffic", "not run: no expert parallelism on one GPU", 0, [])
    return run_benchmark("expert_traffic", f"{machine.sizes.expert_traffic} --expert-parallel {ep}", folder)


def run_part(name: str, words: list[str], folder: Path, read: Callable[[], Any]) -> Part:
    """Run `python -m words…`, then `read` its results. All processes that it started end with it."""
    log, limit_s, started = folder / f"{name.replace('/', '-')}.log", LIMITS_S[name], time.monotonic()
    print(f"{name} … (at most {limit_s} s, output in {log})", flush=True)
    log.unlink(missing_ok=True)
    variables = common.environment(CUDA_DEVICE_MAX_CONNECTIONS="1")  # as moelpr/train/launcher.py
    code = execute(["-m", *words], log, variables, limit_s=limit_s, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - started
    if code == 0:
        return Part(name, "ran", seconds, read())
    outcome = f"stopped after {limit_s} s" if code is None else f"failed with exit code {code}"
    end = log.read_text(errors="replace")[-5000:]
    return Part(name, f"{outcome} (see {log.name})", seconds, output=f"{log.name}:\n{end}")


def as_markdown(machine: Machine, spec: ModelSpec, runs: list[TrainerRun], parts: list[Part]) -> str:
    """Return the section of log.md."""
    tests, trainer, dry, cases, steps, traffic = parts
    shape, sizes = spec.megatron_args, machine.sizes
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    kind = " (dry run: the numbers mean nothing)" if machine.is_dry_run else ""
    rows = []
    for run in runs:
        measured, expected = ((part.results or {}).get(run.name, {}) for part in (trainer, dry))
        planned = {"tokens_per_s": run.predicted_tokens_per_s, "memory_gib": run.planned_bytes / GIB}
        cells = [
            *(_cell(of, "tokens_per_s", ",.0f") for of in (measured, planned)),
            _cell(measured, "share_of_matmul_rate", ".0%"),
            *(_cell(of, "memory_gib", ".2f") for of in (measured, planned, expected)),
            *(_cell(of, key, ",") for key in ("kernels", "waits") for of in (measured, expected)),
        ]
        rows.append([f"trainer, {run.name}", *cells])
    for name, measured in (steps.results or {}).get("contenders", {}).items():
        cells = [_cell(measured, "tokens_per_s", ",.0f"), "–", _cell(measured, "share_of_matmul_rate", ".0%")]
        rows.append([f"train_step, one GPU: {name}", *cells])
    head = "tokens/s per GPU|predicted|share of matmul rate|memory, GiB|planned|dry run|kernels of a step|dry run"
    lines = [
        f"## {date.today()}: first contact with {machine.ranks} × {machine.name}{kind}\n\n"
        f"`launch/first_contact.sh`; {versions}. Trainer: {shape['num_layers']} layers of hidden size "
        f"{shape['hidden_size']}, {sizes.new_experts} new experts, top-2, micro-batches of {sizes.micro_batch_size} × "
        f"{sizes.seq_length} tokens, random weights and text; medians of {STEPS} steps.\n",
        markdown_table(Table([machine.name, *head.split("|"), "waits of a step", "dry run"], rows)) + "\n",
    ]
    if cases.results:
        names = ["case of the launcher", "ranks", "seconds", "difference of losses", "outcome"]
        lines.append(markdown_table(Table(names, cases.results)) + "\n")
    if trainer.results:
        rates = [rate / 1e12 for rate in trainer.results["matmul_flops"]]
        sheet = f", data sheet {machine.cluster.gpu.flops / 1e12:.0f}" if machine.cluster.gpu else ""
        lines.append(f"- Matmul rate: {min(rates):.3g} to {max(rates):.3g} TFLOP/s{sheet}.")
    for one in traffic.results or []:
        lines.append(
            f"- Expert traffic, EP {one['expert_parallel']}, in times of plain Megatron's (SequentialMLP): bytes "
            f"{one['ratio_mean_sent']:.2f} (wanted {one['wanted_ratio']}), the layer's time "
            f"{one['ratio_step_time_stage1']:.2f} in stage 1, {one['ratio_step_time_stage2']:.2f} in stage 2."
        )
    if tests.results:
        outcomes = Counter(outcome for *_, outcome in tests.results)
        lines.append(f"- tests/gpu: {', '.join(f'{number} {outcome}' for outcome, number in outcomes.items())}.")
    ends = (f"{part.name} {part.outcome} ({part.seconds:.0f} s)" for part in parts)
    return "\n".join([*lines, f"- {'; '.join(ends)}."]) + "\n"


def _cell(numbers: dict[str, Any], key: str, form: str) -> str:
    return "–" if numbers.get(key) is None else format(numbers[key], form)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="launch/first_contact.sh", description=(__doc__ or "").splitlines()[0])
    output, parts = Path("runs/first-contact"), list(LIMITS_S)
    what = f"folder for the table, results and logs (default: {output})"
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help=what)
    what = f"what to run (default: all of {', '.join(parts)})"
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=what)
    parser.add_argument("--dry-run", action="store_true", help="try it with tiny sizes on CPU ranks")
    parser.add_argument("--ranks", type=int, metavar="N", help="CPU ranks of a dry run (default: 2)")
    return parser


if __name__ == "__main__":
    run_command(main)
