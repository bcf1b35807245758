"""A start and a restart read each byte of a checkpoint once, over all ranks, and compare it with its checksum."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import common
from moelpr.model.checkpoints.chain import step_folder
from tests.distributed import layout_runs
from tests.distributed.layout_runs import EP2, LAYOUTS, OPTIMIZER

HALF = "--train-iters 2 --exit-interval 1"
RUNS = {
    "flat buffers": OPTIMIZER,
    "by parameter": f"{OPTIMIZER} --dist-ckpt-optim-fully-reshardable",
    "experts on one rank each": f"{EP2} {OPTIMIZER}",
    "optimizer on every rank": "",
    "trained only": f"{OPTIMIZER} --save-trained-only",
}
SMALL_PARTS = 0.05  # the small files that every rank reads, next to the weights of the model below


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    folder = tmp_path_factory.mktemp("reads")
    dense = common.save_random_model(common.qwen2_config(2, 256, 512, layout_runs.VOCAB_SIZE, length=64), folder / "hf")
    layout_runs.make_corpora(folder)
    commands = []
    for name, flags in RUNS.items():
        common.upcycle(dense, folder / name / LAYOUTS["1"].model, 4, random=True, original_copies=2)
        for half in (HALF, "--train-iters 2"):
            words = layout_runs.trainer_arguments(folder, LAYOUTS["1"], "stage1", folder / name / "save")
            words[words.index("--pretrained-checkpoint") + 1] = str(folder / name / LAYOUTS["1"].model)
            commands.append([*words, *flags.split(), *half.split(), "--ckpt-fully-parallel-load"])
    layout_runs.launch_all(folder, {2: commands}, "commands", "tests.distributed.count_reads")
    counts: Counter[str] = Counter()
    for file in folder.glob("*.reads"):
        counts.update(json.loads(file.read_text()))
    return folder, counts


@pytest.mark.parametrize("name", RUNS)
def test_each_byte_is_read_once(reads: tuple[Path, Counter[str]], name: str) -> None:
    folder, counts = reads
    base, saved = step_folder(folder / name / LAYOUTS["1"].model), step_folder(folder / name / "save", 1)
    starts = 2 if name == "trained only" else 1  # frozen weights stay in the base
    for step, times in ((base, starts), (saved, 1)):
        files = [str(path) for path in step.glob("*.distcp")]
        size = sum(Path(file).stat().st_size for file in files)
        assert size > 2**20 and size <= sum(counts[file] for file in files) / times <= (1 + SMALL_PARTS) * size
