"""The trainer with Transformer Engine's layers (a stand-in) trains what it trains without, and resumes either way."""

from pathlib import Path

import pytest
import yaml

from benchmarks import common
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from tests.distributed import layout_runs
from tests.distributed.layout_runs import LAYOUTS, OPTIMIZER, PP2, STEPS, TOLERANCE

LOCAL = "--transformer-impl local"
TE = "--transformer-impl transformer_engine"
FUSED = f"{TE} --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion"
RESHARDABLE = f"{OPTIMIZER} --dist-ckpt-optim-fully-reshardable"
HALF = f"--exit-interval {STEPS - 1}"

# Run → flags of each start, of which all but the last stop before the last step. The CPU path has no data workers.
RUNS = {
    "local": [LOCAL],
    "all fused, data workers": [f"{FUSED} {OPTIMIZER} --num-workers 2"],
    "local, then all fused": [f"{LOCAL} {RESHARDABLE} {HALF}", f"{FUSED} {RESHARDABLE}"],
    "all fused, then local": [f"{FUSED} {HALF}", LOCAL],
    "Transformer Engine, then local": [f"{TE} {HALF}", LOCAL],
}
# Run → flags of each start on two ranks, the first of them unbroken.
_MOMENTS = f"--bf16 --bf16-moments {OPTIMIZER}"
_RESHARDABLE = f"{_MOMENTS} --dist-ckpt-optim-fully-reshardable"
MOMENTS = {
    "moments": [_MOMENTS],
    "moments from flat buffers": [f"{_MOMENTS} {HALF}", _MOMENTS],
    "moments by parameter": [f"{_RESHARDABLE} {HALF}", _RESHARDABLE],
    "moments under another layout": [f"{_RESHARDABLE} {HALF}", f"{_RESHARDABLE} {PP2}"],
    "fp32 moments": [f"--bf16 {OPTIMIZER}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer-engine")
    config = common.qwen2_config(4, 32, 48, layout_runs.VOCAB_SIZE, length=64)
    dense = common.save_random_model(config, folder / "dense")
    common.upcycle(dense, folder / LAYOUTS["1"].model, 4, random=True, original_copies=2)
    layout_runs.make_corpora(folder)
    for ranks, runs in ((1, RUNS), (2, MOMENTS)):
        commands = [
            [*layout_runs.trainer_arguments(folder, LAYOUTS["1"], "stage1", folder / name), "--num-workers=0", *words]
            for name, starts in runs.items()
            for words in map(str.split, starts)
        ]
        layout_runs.launch_all(folder, {ranks: commands}, "commands", "tests.fake_gpu.train_with_stub")
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "local"])
def test_every_kernel_trains_the_same_model(folder: Path, name: str) -> None:
    """Losses, gradient norms and weights; also if the run was stopped and resumed with other kernels."""
    assert layout_runs.difference(folder / name, folder / "local").worst <= TOLERANCE


def test_the_runs_used_the_kernels_and_loaded_strictly(folder: Path) -> None:
    log = (folder / "commands-1.log").read_text()
    for line, number in {
        "experts: Transformer Engine's grouped linear layers; attention: Transformer Engine; ": 3,
        "experts: torch grouped_mm; attention: Transformer Engine; ": 1,
        "dispatcher: all-to-all with Transformer Engine's permutation": 3,
    }.items():
        assert log.count(line) == number, line
    assert "load_return" not in log  # Megatron prints it if it has loaded a model laxly, without keys that do not match
    settings = yaml.safe_load((folder / "all fused, data workers" / "recipe.yaml").read_text())
    assert settings["fuse_expert_gradients"] and settings["num_workers"] == 2


def test_all_kernels_save_the_same_tensors(folder: Path) -> None:
    plain, fused = (
        {key for key in TorchDistReader(folder / name / f"iter_{STEPS:07d}").keys if "optimizer." not in key}
        for name in ("local", "all fused, data workers")
    )
    assert fused == plain and not any("_extra_state" in key for key in plain)


def test_a_run_with_moments_in_bf16_resumes(folder: Path) -> None:
    """Bitwise under its layout; under another one the sums of gradients differ. Moments in fp32 are others."""
    for name in ("moments from flat buffers", "moments by parameter"):
        assert layout_runs.difference(folder / name, folder / "moments").worst == 0, name
    assert layout_runs.difference(folder / "moments under another layout", folder / "moments").worst <= TOLERANCE
    assert 0 < layout_runs.difference(folder / "fp32 moments", folder / "moments").weights < 0.01
