"""Probes: scores of saved steps on benchmarks while the run goes on (--probe-tasks).

Another process exports the step and evaluates it with lm-evaluation-harness: on a GPU that no rank uses, else on the
CPU. Next to a training on GPUs that costs it next to nothing; a training on CPUs waits, because both would be slow.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moelpr.metrics.run_metrics import ProbeEvent
from moelpr.process import ranks
from moelpr.process.errors import UserError
from moelpr.store import yaml_files
from moelpr.store.run_folder import read_json, saved_step

# What a launcher tells a rank, and the other process must not know.
_OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


class Probes:
    """The last rank calls `step` after each step, and `close` at the end."""

    def __init__(
        self, args: argparse.Namespace, write: Callable[[ProbeEvent], None], warn: Callable[[str], None]
    ) -> None:
        self._args, self._write, self._warn = args, write, warn
        self._last = saved_step(Path(args.save))  # a step of an earlier start has been probed
        self._thread: threading.Thread | None = None
        self._found: dict[str, Any] = {}

    def step(self, iteration: int) -> None:
        """Write the scores of a probe that has ended, and start that of a step that has been saved."""
        if self._thread and not self._thread.is_alive():
            self._report(iteration, waited_s=0.0)
        saved = saved_step(Path(self._args.save))
        if self._thread or saved is None or saved == self._last or saved % self._args.probe_interval:
            return
        self._last = saved
        device, waits = probe_device()
        self._thread = threading.Thread(target=self._run, args=(saved, device), daemon=True)
        self._thread.start()
        if waits:
            self._wait(iteration)

    def close(self, iteration: int) -> None:
        """Probe the last step too, and wait for its scores."""
        self.step(iteration)
        if self._thread and not self._wait(iteration):
            self._warn("the last probe takes too long; run moelpr evaluate harness on an export")

    def _wait(self, iteration: int) -> bool:
        """Wait for a probe, for half of the time that the other ranks wait for this one."""
        assert self._thread is not None
        started = time.monotonic()
        self._thread.join(30.0 * self._args.distributed_timeout_minutes)
        if is_done := not self._thread.is_alive():
            self._report(iteration, time.monotonic() - started)
        return is_done

    def _report(self, iteration: int, waited_s: float) -> None:
        self._thread, found = None, self._found
        if "error" in found:
            return self._warn(f"step {found['step']} could not be probed ({found['error']}); training goes on")
        event: Any = {"iteration": iteration, "event": "probe", "waited_s": round(waited_s, 1)} | found
        self._write(event)

    def _run(self, step: int, device: str) -> None:
        args, started = self._args, time.monotonic()
        folder = Path(f"{args.save.rstrip('/')}-probes", str(step))  # an export is not written into a run folder
        model, (tasks, *include) = folder / "hf", args.probe_tasks
        codes = ",".join(languages_of(Path(tasks)))
        export = ["export", "--load", args.save, "--iteration", step, "--save", model, "--overwrite", "--no-verify"]
        evaluate = ["evaluate", "harness", "--model", f"step={model}", "--tasks", tasks, "--device", device]
        evaluate += ["--languages", codes, "--original-languages", codes, "--limit", args.probe_limit, "--no-verify"]
        evaluate += ["--output", folder / "results", *(["--include-path", *include] if include else [])]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        self._found = {"step": step}
        for words in (export, evaluate):
            command = [sys.executable, "-m", "moelpr", *map(str, words)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                self._found["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                return
        scores = (read_json(folder / "results" / "harness.json") or {})["models"]["step"]["scores"]
        found = {
            f"{name}/{code}": round(one["value"], 2)
            for name, by_code in scores.items()
            for code, one in by_code.items()
        }
        shutil.rmtree(model)
        self._found |= {"scores": found, "seconds": round(time.monotonic() - started, 1)}


def probe_device() -> tuple[str, bool]:
    """Where probes run, and whether training waits for them."""
    if not torch.cuda.is_available():
        return "cpu", True
    gpus = torch.cuda.device_count()
    return (f"cuda:{gpus - 1}" if gpus > ranks.local_world_size() else "cpu"), False


def languages_of(path: Path) -> list[str]:
    """The languages of a table of tasks."""
    entries = yaml_files.read_mapping(path, "table of tasks").values()
    found = dict.fromkeys(code for entry in entries if isinstance(entry, dict) for code in entry.get("tasks") or ())
    if not found:
        raise UserError(
            f"{path} has no tasks; pass --probe-tasks a table as --tasks of moelpr evaluate harness takes it"
        )
    return ["no" if code == "false" else code for code in found]
