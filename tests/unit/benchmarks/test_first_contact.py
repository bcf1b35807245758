import argparse
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import first_contact
from benchmarks.first_contact import USABLE, Machine, Part, as_markdown, find_machine, run_part, trainer_runs
from benchmarks.trainer_steps import kernels_and_waits
from moelpr.base.errors import UserError
from moelpr.plan.gpus import GIB

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(("ranks", "memory_gib"), [(8, 79.2), (1, 79.2), (1, 23.6), (6, 79.2)])
def test_the_model_is_the_largest_that_fits(ranks: int, memory_gib: float, monkeypatch) -> None:
    spec, runs = trainer_runs(Machine(H100, ranks, memory_gib))
    assert max(run.planned_bytes for run in runs) <= USABLE * memory_gib * GIB
    sizes = first_contact.GPU_SIZES
    if place := sizes.layers.index(spec.megatron_args["num_layers"]):
        monkeypatch.setattr(first_contact, "GPU_SIZES", replace(sizes, layers=sizes.layers[place - 1 : place]))
        with pytest.raises(UserError, match="memory"):
            trainer_runs(Machine(H100, ranks, memory_gib))


def test_runs_use_all_gpus_and_expert_parallelism_where_experts_can_be_divided() -> None:
    names = {ranks: [run.name for run in trainer_runs(Machine(H100, ranks, 79.2))[1]] for ranks in (1, 6, 8)}
    assert names == {
        1: ["stage 1, DP 1", "stage 2, DP 1"],
        6: ["stage 1, DP 6", "stage 1, DP 6, EP 2", "stage 2, DP 6"],
        8: ["stage 1, DP 8", "stage 1, DP 8, EP 8", "stage 2, DP 8"],
    }
    for run in trainer_runs(Machine(H100, 8, 79.2))[1]:
        assert run.layout.world_size == 8
        assert run.predicted_tokens_per_s and 1e3 < run.predicted_tokens_per_s < 1e6
    assert {run.predicted_tokens_per_s for run in trainer_runs(Machine("NVIDIA L40", 8, 44.4))[1]} == {None}
    assert first_contact.run_expert_traffic(Machine(H100, 1, 79.2), Path()).outcome.startswith("not run")


@pytest.mark.parametrize(
    ("dry_run", "ranks", "named"), [(False, None, "--dry-run"), (False, 2, "--ranks"), (True, 0, "--ranks")]
)
def test_a_dry_run_is_offered_without_a_gpu_and_has_the_ranks(monkeypatch, dry_run: bool, ranks, named: str) -> None:
    monkeypatch.setattr(first_contact, "gpus_of_torch", list)
    with pytest.raises(UserError, match=named):
        find_machine(argparse.Namespace(dry_run=dry_run, ranks=ranks))


def test_measurements_are_medians_of_late_steps_and_the_table_has_predictions_of_failed_parts() -> None:
    machine = Machine(H100, 8, 79.2)
    spec, runs = trainer_runs(machine)
    steps = [{"tokens_per_s": tokens, "peak_memory_gib": 41.5} for tokens in (1.0, 1.0, 80_000.0, 88_000.0, 96_000.0)]
    steps[-1] |= {"kernels": 31_000, "waits": 97}
    last_rank = {"runs": {run.name: {"held_gib": 0.5, "steps": steps} for run in runs}}
    measured = first_contact._measured(runs[0], last_rank, 600e12)
    share = pytest.approx(11_000 * runs[0].flops_per_token / 600e12)
    expected = {"tokens_per_s": 11_000, "memory_gib": 41.0, "share_of_matmul_rate": share}
    assert measured == expected | {"kernels": 31_000, "waits": 97}
    failed = [Part(name, "failed with exit code 1", 3) for name in first_contact.LIMITS_S]
    text = as_markdown(machine, spec, runs, failed)
    assert all(f"{part.name} failed with exit code 1" in text for part in failed)
    (row,) = [line for line in text.splitlines() if line.startswith("| trainer, stage 1, DP 8 ")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:6] == ["–", f"{runs[0].predicted_tokens_per_s:,.0f}", "–", "–"]


def test_kernels_and_waits_are_counted_among_profiled_events() -> None:
    names = {
        torch.autograd.DeviceType.CUDA: [
            "gemm",
            "Memcpy DtoH (Device -> Pinned)",
            "ncclDevKernel_AllReduce_Sum",
            "silu",
        ],
        torch.autograd.DeviceType.CPU: ["aten::mm", "cudaLaunchKernel", "cudaStreamSynchronize"],
    }
    events = [SimpleNamespace(device_type=device, name=name) for device, its in names.items() for name in its]
    assert kernels_and_waits(events) == {"kernels": 3, "waits": 1}


def test_a_part_that_fails_or_hangs_is_reported_and_leaves_no_process(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(first_contact.LIMITS_S, "part", 3)

    def run(statement: str) -> Part:
        return run_part("part", ["timeit", "-n1", "-r1", statement], tmp_path, lambda: "read")

    done, failed = run("pass"), run("raise ValueError('the reason')")
    assert (done.outcome, done.results) == ("ran", "read")
    assert failed.outcome == "failed with exit code 1 (see part.log)" and failed.results is None
    assert "the reason" in (tmp_path / "part.log").read_text()
    started = time.monotonic()
    start = "subprocess.Popen(['sleep', '99'], start_new_session=True)"
    hung = run(f"import subprocess; p = {start}; print(p.pid, flush=True); p.wait()")
    assert hung.outcome == "stopped after 3 s (see part.log)" and hung.results is None
    assert time.monotonic() - started < 20
    sleeper = int((tmp_path / "part.log").read_text().split()[0])
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(sleeper).status() != psutil.STATUS_ZOMBIE:  # nobody may ask for its exit code
            assert time.monotonic() - started < 20
            time.sleep(0.1)


def test_tests_are_counted_and_cases_of_the_launcher_are_rows_also_if_one_failed(tmp_path: Path, monkeypatch) -> None:
    passed = '<testcase name="a" time="1.5"><properties><property name="ranks" value="2"/></properties></testcase>'
    failed = '<testcase name="b" time="2"><failure message="x"/></testcase>'

    def run_part(name: str, *_: object) -> Part:
        (tmp_path / "cases.xml").write_text(f"<testsuites><testsuite>{passed}{failed}</testsuite></testsuites>")
        return Part(name, "failed with exit code 1", 3, output="the end of its log")

    monkeypatch.setattr(first_contact, "run_part", run_part)
    part = first_contact.run_tests("cases", [], tmp_path)
    assert part.results == [["a", "2", "1.5", "–", "passed"], ["b", "–", "2", "–", "failure"]]
    machine = Machine(H100, 8, 79.2)
    others = [Part(name, "not chosen", 0) for name in first_contact.LIMITS_S if name != "cases"]
    parts = [replace(part, name="tests/gpu"), *others[1:3], part, *others[3:]]
    text = as_markdown(machine, *trainer_runs(machine), parts)
    assert "- tests/gpu: 1 passed, 1 failure." in text
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "passed"] == [row[index] for row in rows if row[1:2] == ["a"] for index in (1, -2)]
