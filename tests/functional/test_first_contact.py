import json
import subprocess
from pathlib import Path

from benchmarks.first_contact import LIMITS_S
from tests.support.limits import PROCESS_S

ROOT = Path(__file__).parents[2]


def test_a_dry_run_measures_the_parts_and_writes_the_table(tmp_path: Path) -> None:
    """All parts but `cases`, which are tests of their own (tests/gpu/test_launcher_cases.py)."""
    parts = [part for part in LIMITS_S if part != "cases"]
    command = [ROOT / "launch/first_contact.sh", "--dry-run", "--output", str(tmp_path), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S)
    logs = "".join(f"{log.name}:\n{log.read_text()[-3000:]}\n" for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = json.loads((tmp_path / "results.json").read_text())
    outcomes = {part["name"]: part["outcome"] for part in results["parts"]}
    assert outcomes == dict.fromkeys(LIMITS_S, "ran") | {"cases": "not chosen"}
    tests, trainer, dry, _, steps, traffic = (part["results"] for part in results["parts"])
    assert "skipped" in {outcome for *_, outcome in tests}
    assert len(trainer["matmul_flops"]) == 2 and min(trainer["matmul_flops"]) > 0
    for run in results["runs"]:
        assert dry[run["name"]]["kernels"] > 100 and dry[run["name"]]["waits"] > 0
        actual = trainer[run["name"]]
        assert actual["tokens_per_s"] > 0 and 0 < actual["share_of_matmul_rate"] < 1 and actual["memory_gib"] > 0
    assert steps["contenders"]["ours, stage1"]["tokens_per_s"] > 0
    assert [one["expert_parallel"] for one in traffic] == [2]
    text = (tmp_path / "log.md").read_text()
    assert "dry run: the numbers mean nothing" in text and text in done.stdout
    assert all(f"| trainer, {run['name']} " in text for run in results["runs"])
