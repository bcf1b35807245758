from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from moelpr.base.errors import UserError
from moelpr.model.checkpoints.chain import BaseCheckpoint, checkpoint_chain, checksum, write_checksums
from moelpr.model.layers.freezing import freeze
from moelpr.model.layers.loading import build_model, load_model
from moelpr.model.layers.weights import load_weights, save_trained_only, trained_entries
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")

ROUTERS, NEW_EXPERTS = ".mlp.router.", ".mlp.experts."


def save(model: torch.nn.Module, folder: Path, spec: ModelSpec, base: Path | None = None) -> Path:
    """Save the model's sharded state as `folder`/iter_0000001; returns that step folder."""
    step = folder / "iter_0000001"
    step.mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(step))
    write_checksums(step)
    spec.write(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    if base:
        BaseCheckpoint.of(base, checksum(base), folder).write(folder)
    return step


def stage(model: torch.nn.Module, name: str) -> None:
    """Simulate a stage: trained parameters get other values, and only they are saved."""
    freeze([model], name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    save_trained_only(model)


@pytest.fixture(scope="module")
def chain_of_three(tmp_path_factory: pytest.TempPathFactory, megatron: None, moe_spec: ModelSpec) -> Path:
    """upcycled <- stage1 <- stage2, and `whole`: the complete model of stage 2."""
    folder = tmp_path_factory.mktemp("chain")
    upcycled = save(build_model(moe_spec), folder / "upcycled", moe_spec)
    model = load_model(folder / "upcycled")
    stage(model, "stage1")
    stage1 = save(model, folder / "stage1", moe_spec, upcycled)
    model = load_model(folder / "stage1")
    whole_state = model.sharded_state_dict
    stage(model, "stage2")
    save(model, folder / "stage2", moe_spec, stage1)
    model.sharded_state_dict = whole_state
    save(model, folder / "whole", moe_spec)
    return folder


def test_a_model_read_from_the_chain_equals_the_complete_one(chain_of_three: Path) -> None:
    whole, chained = load_model(chain_of_three / "whole"), load_model(chain_of_three / "stage2")
    for (name, expected), actual in zip(whole.named_parameters(), chained.parameters(), strict=True):
        assert torch.equal(expected, actual), name
    upcycled = dict(load_model(chain_of_three / "upcycled").named_parameters())
    for name, parameter in chained.named_parameters():
        moved = ROUTERS in name or NEW_EXPERTS in name
        assert torch.equal(parameter, upcycled[name]) != moved, name


def test_frozen_weights_can_be_loaded_separately(chain_of_three: Path, moe_spec: ModelSpec) -> None:
    model = build_model(moe_spec)
    freeze([model], "stage2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    load_weights([model], checkpoint_chain(chain_of_three / "stage2")[1:], only_frozen=True)
    for name, parameter in model.named_parameters():
        if before[name].unique().numel() > 1:  # norms are initialized to ones in both
            assert torch.equal(parameter, before[name]) == (ROUTERS in name), name


def test_a_tensor_that_is_missing_from_the_chain_is_named(chain_of_three: Path, moe_spec: ModelSpec) -> None:
    with pytest.raises(UserError, match=r"stage2/iter_0000001 lacks embedding.word_embeddings.weight and \d+ more"):
        load_weights([build_model(moe_spec)], [chain_of_three / "stage2/iter_0000001"])


def test_state_of_a_module_that_trains_is_saved_with_it(moe_spec: ModelSpec) -> None:
    """Transformer Engine keeps FP8 scales as extra state."""
    model = build_model(moe_spec)
    freeze([model], "stage1")
    trains = trained_entries(model)
    assert trains("decoder.layers.0.mlp.experts.linear_fc1._extra_state")
    assert trains("decoder.layers.0.mlp.experts.linear_fc1.weight")
    assert not trains("decoder.layers.0.mlp.original_experts.0.linear_fc1._extra_state")
    assert not trains("decoder.layers.0.mlp.original_experts.0.linear_fc1.weight")
    assert not trains("output_layer.weight")  # a tied copy is not a parameter
