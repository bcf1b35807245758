import json
import subprocess
from pathlib import Path

import pytest

from tests.support.limits import PROCESS_S

ROOT = Path(__file__).parents[2]


ALL = ("tests/gpu", "trainer", "dry_steps", "cases", "train_step", "expert_traffic")


@pytest.mark.parametrize(
    ("ranks", "parts"), [(1, ("tests/gpu", "trainer", "dry_steps")), pytest.param(2, ALL, marks=pytest.mark.slow)]
)
def test_a_dry_run_measures_the_parts_and_writes_the_table(ranks: int, parts: tuple[str, ...], tmp_path: Path) -> None:
    command = [ROOT / "launch/first_contact.sh", "--dry-run", "--ranks", str(ranks), "--output", str(tmp_path)]
    done = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True, timeout=PROCESS_S)
    logs = "".join(f"{log.name}:\n{log.read_text()[-3000:]}\n" for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = json.loads((tmp_path / "results.json").read_text())
    outcomes = {part["name"]: part["outcome"] for part in results["parts"]}
    assert outcomes == {name: "ran" if name in parts else "not chosen" for name in ALL}
    tests, trainer, dry, _, steps, traffic = (part["results"] for part in results["parts"])
    assert tests["skipped"] > 0
    assert len(trainer["matmul_flops"]) == ranks and min(trainer["matmul_flops"]) > 0
    for run in results["runs"]:
        assert dry[run["name"]]["kernels"] > 100 and dry[run["name"]]["waits"] > 0
        actual = trainer[run["name"]]
        assert actual["tokens_per_s"] > 0 and 0 < actual["share_of_matmul_rate"] < 1 and actual["memory_gib"] > 0
    if parts == ALL:
        assert steps["contenders"]["ours, stage1"]["tokens_per_s"] > 0
        assert [one["expert_parallel"] for one in traffic] == [2]
    text = (tmp_path / "log.md").read_text()
    assert "dry run: the numbers mean nothing" in text and text in done.stdout
    assert all(f"| trainer, {run['name']} | " in text for run in results["runs"])
