"""The trainer with Transformer Engine's layers (a stand-in) trains what it trains without, and resumes either way."""

from pathlib import Path

import pytest

from benchmarks import common
from moelpr.torch_dist import TorchDistReader
from tests.distributed import layout_runs
from tests.distributed.layout_runs import LAYOUTS, OPTIMIZER, STEPS, TOLERANCE

LOCAL = "--transformer-impl local"
TE = "--transformer-impl transformer_engine"
FUSED = f"{TE} --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion {OPTIMIZER}"
RESHARDABLE = f"{OPTIMIZER} --dist-ckpt-optim-fully-reshardable"
HALF = f"--exit-interval {STEPS - 1}"

# Run → flags of each start, of which all but the last stop before the last step. Without workers, unless they say so.
RUNS = {
    "local": [LOCAL],
    "Transformer Engine": [TE],
    "all fused": [FUSED],
    "data workers": [f"{LOCAL} --num-workers 2"],
    "resumed with all fused": [f"{FUSED} {HALF}", FUSED],
    "local, then Transformer Engine": [f"{LOCAL} {HALF}", TE],
    "Transformer Engine, then local": [f"{TE} {HALF}", LOCAL],
    "all fused, then local": [f"{FUSED} {RESHARDABLE} {HALF}", f"{LOCAL} {RESHARDABLE}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer-engine")
    layout_runs.make_material(folder)
    commands = [
        [*layout_runs.trainer_arguments(folder, LAYOUTS["1"], "stage1", folder / name), "--num-workers", "0", *words]
        for name, starts in RUNS.items()
        for words in map(str.split, starts)
    ]
    plan = folder / "commands.json"
    common.write_json(commands, plan)
    common.run_ranks(1, "tests.fake_gpu.train_with_stub", plan, log=folder / "log", timeout_s=280)
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "local"])
def test_every_kernel_trains_the_same_model(folder: Path, name: str) -> None:
    """Losses, gradient norms and weights; also if the run was stopped and resumed with other kernels."""
    assert layout_runs.difference(folder / name, folder / "local").worst <= TOLERANCE


def test_the_runs_used_the_kernels(folder: Path) -> None:
    log = (folder / "log").read_text()
    for line, number in {
        "experts: Transformer Engine's grouped linear layers; attention: Transformer Engine; ": 4,
        "experts: torch grouped_mm; attention: Transformer Engine; ": 3,
        "dispatcher: all-to-all with Transformer Engine's permutation": 4,
    }.items():
        assert log.count(line) == number, line


def test_every_checkpoint_was_loaded_strictly(folder: Path) -> None:
    """Megatron prints this if it has loaded a model laxly, which hides keys that do not match."""
    assert "load_return" not in (folder / "log").read_text()


def test_all_kernels_save_the_same_tensors(folder: Path) -> None:
    keys = {name: TorchDistReader(folder / name / f"iter_{STEPS:07d}").keys for name in ("local", "all fused")}
    model = {name: {key for key in found if not key.startswith("optimizer.")} for name, found in keys.items()}
    assert model["all fused"] == model["local"]
    assert not any("_extra_state" in key for key in model["local"])
