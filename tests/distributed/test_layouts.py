"""N ranks = 1 rank: a few layouts of tests/distributed/layout_runs.py that together contain every pair of features."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from moelpr.model.checkpoints.chain import step_folder
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from tests.distributed import layout_runs as layouts
from tests.distributed import resume_layouts
from tests.distributed.layout_runs import LAYOUTS, STAGES, Layout
from tests.faults.commands import tensors

pytestmark = pytest.mark.timeout(900)  # the first test waits for all runs: two minutes on two free cores

PAIRS = (
    "TP2+SP ETP2 EP2 distributed optimizer, selective recompute",
    "TP2+SP ETP2 PP2 VPP2 overlapped, full recompute",
    "TP2+SP EP2 PP2 VPP2 overlapped, selective recompute, per-token loss",
    "TP2+SP ETP2 EP2 overlapped, full recompute, per-token loss",
)
# In PAIRS the optimizer of new experts, and with virtual stages all of it, is divided over groups of one rank.
REPLICATED = ("EP2 DP2 overlapped", "PP2 VPP2 DP2 overlapped")
EDGES = ("edges TP2+SP PP2", "edges PP2 EP2 distributed optimizer")
ONE_PROCESS = ("1 accumulation",)
APART = ("TP2+SP ETP2 PP2 VPP2 documents apart, selective recompute",)
NEW_ROWS = ("rows TP2+SP PP2, full recompute", "rows PP2 VPP2 DP2 overlapped")
HYBRID = ("hybrid TP2+SP PP2 documents apart, full recompute",)
RESUMED = "^EP2 -> 1$"
SAVES = ("--save-interval 100", "--save-trained-only")
SUITE = (*HYBRID, *ONE_PROCESS, *PAIRS, *REPLICATED, *EDGES, *APART, *NEW_ROWS)

# Expert tensor parallelism, the last one, is the default with tensor parallelism.
FEATURES = (layouts.TP2, layouts.EP2, layouts.PP2, layouts.VPP2, layouts.OPTIMIZER, "--overlap-grad-reduce")
FEATURES += (layouts.FULL, layouts.SELECTIVE, "--calculate-per-token-loss", "expert tensor parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; those of the same number of ranks in one launch, but for what resumes after another number."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts.make_material(folder)
    references = [LAYOUTS[name].reference for name in SUITE]
    before, after = resume_layouts.halves(folder, RESUMED)
    before[2] += [*_resumed_commands(folder), *_on_host_commands(folder)]
    layouts.run_layouts(folder, list(dict.fromkeys([*references, *SUITE])), before)
    layouts.launch_all(folder, after, "resumed")
    return folder


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in SUITE for stage in LAYOUTS[name].stages])
def test_layout_equals_one_process(folder: Path, name: str, stage: str) -> None:
    assert layouts.compare(folder, name, stage).worst <= layouts.TOLERANCE


def test_a_run_resumes_under_another_layout(folder: Path) -> None:
    """Optimizer state of experts from two ranks; more pairs: python -m tests.distributed.resume_layouts."""
    actual = resume_layouts.rows(folder, RESUMED)
    assert [pair["stage"] for pair in actual] == [*STAGES] and not any(map(layouts.is_off, actual)), actual


def test_held_out_text_is_scored_before_the_first_step_and_after_the_last(folder: Path) -> None:
    """`layouts.compare` compares the scores."""
    for name in SUITE:
        passes = layouts.validations(layouts.run_folder(folder, name, LAYOUTS[name].stages[-1]))
        assert len(passes) == 2 and passes[0] != passes[1]
        assert all(result["lm_loss"] > 0 for result in passes[0].values())


def test_the_layouts_contain_every_pair_of_features() -> None:
    held = {pair for name in PAIRS for pair in combinations(_features(name), 2)}
    mutually_exclusive = {(layouts.FULL, layouts.SELECTIVE)}
    assert set(combinations(FEATURES, 2)) - held == mutually_exclusive


def _features(name: str) -> list[str]:
    flags = LAYOUTS[name].flags
    flags += " expert tensor parallel" if layouts.TP2 in flags and layouts.TP2_ETP1 not in flags else ""
    return [feature for feature in FEATURES if feature in flags]


@pytest.mark.parametrize("name", ["1", PAIRS[0], "hybrid 1 documents apart", *HYBRID])
@pytest.mark.parametrize("stage", STAGES)
def test_all_but_routers_and_new_experts_is_bitwise_identical_after_training(
    folder: Path, name: str, stage: str
) -> None:
    """A model that is not hybrid has two original experts: the dense model's FFN and one of an earlier round."""
    start = TorchDistReader(folder / LAYOUTS[name].model / "release")
    trained = layouts.weights(layouts.run_folder(folder, name, stage))
    assert sum(".mlp.original_experts.1." in key for key in trained) == (0 if "hybrid" in name else 2 * 4)
    for key, weight in trained.items():
        before = start.read(key)
        moves = ".mlp.router." in key or (stage == "stage1" and ".mlp.experts." in key)
        assert torch.equal(weight[: len(before)], before) != moves, key  # the run has padded the vocabulary


@pytest.mark.parametrize(("name", "stage"), [(name, s) for name in ("rows 1", *NEW_ROWS) for s in LAYOUTS[name].stages])
def test_of_the_vocabulary_only_rows_of_new_tokens_train(folder: Path, name: str, stage: str) -> None:
    """Under weight decay too; with tensor parallelism, both ranks have new rows."""
    start = TorchDistReader(folder / "rows" / "release")
    key, first, end = "embedding.word_embeddings.weight", layouts.NEW_TOKENS.first, layouts.NEW_TOKENS.end
    before = start.read(key)
    for run_key, weight in layouts.weights(layouts.run_folder(folder, name, stage)).items():
        if run_key == key:
            assert (weight[first:end] != before[first:end]).any(dim=1).all()
            assert torch.equal(weight[:first], before[:first]) and torch.equal(weight[end : len(before)], before[end:])
            assert len(weight) > len(before) and not weight[len(before) :].any()  # padding
        else:
            moves = stage == "stage1" and (".mlp.router." in run_key or ".mlp.experts." in run_key)
            assert torch.equal(weight, start.read(run_key)) != moves, run_key


def test_new_rows_resume_bit_for_bit_from_what_two_stages_saved(folder: Path) -> None:
    """Both stages save trained tensors only: stage 1's base is stage 0, whose base is the converted model."""
    resumed = _resumed(folder)
    whole = TorchDistReader(step_folder(resumed["whole"]))
    assert tensors(resumed["whole"]) == tensors(resumed["broken"])
    assert {key.split(".")[0] for key in whole.keys} == {"embedding", "decoder", "optimizer"}
    alone = TorchDistReader(step_folder(resumed["stage0"]))
    assert {key for key in alone.keys if not key.startswith("optimizer.")} == {"embedding.word_embeddings.weight"}


def test_an_optimizer_on_the_host_trains_bit_for_bit_what_others_do(folder: Path) -> None:
    """In bf16, whose fp32 masters are on the host too; begun without it, and resumed twice from the flat format."""
    plain, on_host = (folder / f"optimizer-{name}" for name in ("plain", "host"))
    assert layouts.difference(on_host, plain).worst == 0.0
    start = TorchDistReader(folder / "all-moe" / "release")
    for key, weight in layouts.weights(on_host).items():
        before = start.read(key).bfloat16()
        moves = ".mlp.router." in key or ".mlp.experts." in key
        assert torch.equal(weight[: len(before)], before) != moves, key


def test_a_layout_that_trains_differently_is_detected(folder: Path) -> None:
    """The comparison can fail: without the balance loss, or with documents apart, the results differ."""
    for name in ("1 no balance loss", "1 documents apart"):
        other = layouts.run_folder(folder, name, "stage1")
        assert layouts.difference(other, layouts.run_folder(folder, "1", "stage1")).worst > layouts.TOLERANCE, name


@pytest.mark.parametrize("stage", STAGES)
def test_the_edge_model_sees_batches_without_original_tokens(folder: Path, stage: str) -> None:
    losses = [record["lpr_loss"] for record in layouts.metrics(layouts.run_folder(folder, "edges 1", stage))]
    assert None in losses and losses != [None] * layouts.STEPS


def test_of_the_edge_model_two_layers_train_and_the_second_expert_parallel_rank_gets_no_token(folder: Path) -> None:
    """So the last pipeline stage has nothing to train."""
    start = TorchDistReader(folder / "edges" / "release")
    trained = layouts.weights(layouts.run_folder(folder, "edges 1", "stage1"))
    before = {key: start.read(key) for key in trained}
    # The run has padded the vocabulary.
    moved = {key for key, weight in trained.items() if not torch.equal(weight[: len(before[key])], before[key])}
    assert {key.split(".")[2] for key in moved} == {"0", "1"}
    experts = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    moved_experts = (trained[experts] != before[experts]).flatten(1).any(dim=1)
    assert moved_experts.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("saves", SAVES)
def test_a_run_whose_last_pipeline_stage_trains_nothing_can_be_resumed(folder, saves) -> None:
    """A stage that trains nothing has no optimizer state and, with --save-trained-only, nothing in the checkpoint."""
    ours, theirs = _resumed(folder)[saves], layouts.run_folder(folder, "edges 1", "stage1")
    for a, b in zip(layouts.metrics(ours), layouts.metrics(theirs), strict=True):
        assert (a["lm_loss"], a["grad_norm"]) == pytest.approx((b["lm_loss"], b["grad_norm"]), rel=layouts.TOLERANCE)
    saved, whole = (layouts.weights(run) for run in (ours, theirs))
    assert layouts.weights_difference(saved, {key: whole[key] for key in saved}) <= layouts.TOLERANCE


def _resumed(folder: Path) -> dict[str, Path]:
    """Runs on two pipeline stages, some of them stopped before their last step and resumed.

    Stage 1 of the edge model; and of the one with new tokens, from its stage 0: `whole`, and the same `broken`.
    """
    return {name: folder / f"resumed-{name.split()[0]}" for name in (*SAVES, "stage0", "whole", "broken")}


def _resumed_commands(folder: Path) -> list[list[str]]:
    runs = _resumed(folder)
    commands = [
        [*layouts.trainer_arguments(folder, LAYOUTS["edges PP2"], "stage1", runs[saves]), *saves.split(), *stop]
        for saves in SAVES
        for stop in (["--exit-interval", str(layouts.STEPS - 1)], [])
    ]
    for name, stop in (("stage0", []), ("whole", []), ("broken", ["--exit-interval", "2"]), ("broken", [])):
        stage = "stage0" if name == "stage0" else "stage1"
        # Here the buffer of the first stage has padding between its router and the tied embeddings.
        layout = Layout(2, f"{layouts.PP2} {layouts.VPP2}", model="rows")
        command = layouts.trainer_arguments(folder, layout, stage, runs[name])
        start = [] if name == "stage0" else ["--pretrained-checkpoint", str(runs["stage0"])]
        # Without this format, checkpoints contain the padding of buffers, which is not initialized.
        options = ["--save-trained-only", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
        commands.append([*command, *start, *options, *stop])
    return commands


def _on_host_commands(folder: Path) -> list[list[str]]:
    """Stage 1 with and without the optimizer on the host, the latter in three starts, of which the first is without."""
    layout, on_host = Layout(2, f"{layouts.EP2} {layouts.OPTIMIZER} --bf16"), "--optimizer-cpu-offload"
    plain, broken = (
        layouts.trainer_arguments(folder, layout, "stage1", folder / f"optimizer-{name}") for name in ("plain", "host")
    )
    starts = [["--exit-interval", "1"], [on_host, "--exit-interval", "2"], [on_host]]
    return [plain, *([*broken, *words] for words in starts)]
