"""Cleaning as jobs of a real Slurm gives what this machine's processes give."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.material import ROOT


def test_cleaning_on_slurm_equals_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcdef", k=4)) for _ in range(30)) for _ in range(20)]
    lines = [json.dumps({"text": draw.choice(texts)}) + "\n" for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    clean = [sys.executable, "-m", "moelpr", "data", "clean", "--input", str(tmp_path / "a.jsonl"), "--tasks", "3"]
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
    slurm = ["--executor", "slurm", "--partition", "low", "--time", "00:10:00", "--workers", "2"]
    here = ["--output", str(tmp_path / "here"), "--workers", "1"]
    subprocess.run([*clean, *here], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    command = [*clean, *slurm, "--output", str(tmp_path / "there")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"\d+", done.stdout.split(";")[0])
    assert len(jobs) == 5
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "are pending or running on Slurm; wait for them, or cancel them" in again.stderr
    assert {cluster.wait(job) for job in jobs} == {"COMPLETED"}
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.zst")} for name in ("there", "here")
    )
    assert found == expected and found
