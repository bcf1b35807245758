"""A checkpoint from an untrusted source runs no code, whatever Megatron loads from it, and a damaged file is named."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from moelpr.base.errors import UserError
from tests.support.hf_models import RunsCode, replace_object

pytestmark = pytest.mark.usefixtures("megatron")

OBJECTS = {
    "decoder.layers.0.linear._extra_state": None,
    "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
    "optimizer.param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "step": 3}],
}


def sharded_state() -> dict[str, Any]:
    """A state as of a model, its optimizer and the random state: objects and a tensor."""
    state: dict[str, Any] = {key: ShardedObject(key, value, (1,), (0,)) for key, value in OBJECTS.items()}
    return state | {"weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0))}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step that Megatron saved."""
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    dist_checkpointing.save(sharded_state() | {"iteration": 1}, str(folder), async_strategy="mcore")
    return folder


def load(step: Path) -> dict[str, Any]:
    return dist_checkpointing.load(sharded_state(), str(step))


def test_everything_that_megatron_saves_is_loaded(step: Path) -> None:
    loaded = load(step)
    assert loaded["iteration"] == 1 and torch.equal(loaded["weight"], torch.arange(6.0))
    assert loaded["optimizer.param_groups"] == OBJECTS["optimizer.param_groups"]
    state, expected = loaded["rng_state"][0], OBJECTS["rng_state"][0]
    assert torch.equal(state["torch_rng_state"], expected["torch_rng_state"])
    assert all(np.array_equal(a, b) for a, b in zip(state["np_rng_state"], expected["np_rng_state"], strict=True))


@pytest.mark.parametrize("key", [*OBJECTS, "common_state"])
def test_an_object_that_would_run_code_is_refused(step: Path, tmp_path: Path, key: str) -> None:
    trap = tmp_path / "ran"
    replace_object(step, key, [RunsCode(trap)])
    with pytest.raises(UserError, match=r"__0_0.distcp .* would run \w+"):
        load(step)
    assert not trap.exists()


def test_a_module_state_that_transformer_engine_would_unpickle_is_refused(step: Path, tmp_path: Path) -> None:
    hostile, plain = pickle.dumps(RunsCode(tmp_path / "ran")), pickle.dumps({"scale_fwd": [1.0]})
    key = "decoder.layers.0.linear._extra_state"
    replace_object(step, key, [torch.frombuffer(bytearray(plain), dtype=torch.uint8)])
    assert load(step)[key].numel() == len(plain)
    replace_object(step, key, [torch.frombuffer(bytearray(hostile), dtype=torch.uint8)])
    with pytest.raises(UserError, match=r"distcp .* would run \w+"):
        load(step)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("attribute", ["planner_data", "state_dict_metadata", "storage_data", None])
def test_a_table_of_contents_runs_no_code(step: Path, tmp_path: Path, attribute: str | None) -> None:
    """As additional data it is ignored; as the table itself it is refused."""
    trap, path = tmp_path / "ran", step / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    if attribute:
        setattr(metadata, attribute, RunsCode(trap))
    path.write_bytes(pickle.dumps(metadata if attribute else RunsCode(trap)))
    if attribute == "planner_data":
        assert torch.equal(load(step)["weight"], torch.arange(6.0))
    else:
        with pytest.raises(UserError, match=r"\.metadata is damaged"):
            load(step)
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists()  # as an unrestricted reader would have run it


def test_the_common_state_of_older_versions_runs_no_code(step: Path, tmp_path: Path) -> None:
    torch.save({"iteration": 7}, step / "common.pt")
    assert load(step)["iteration"] == 7
    torch.save({"iteration": RunsCode(tmp_path / "ran")}, step / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt .* would run \w+"):
        load(step)
    (step / "common.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"common\.pt is truncated"):
        load(step)
    assert not (tmp_path / "ran").exists()


def test_a_step_that_looks_like_an_older_versions_is_refused(step: Path) -> None:
    with pytest.raises(UserError, match="model_optim_rng.pt does not exist; copy the checkpoint again"):
        load(step / "mp_rank_00/model_optim_rng.pt")


def test_unrestricted_loading_cannot_be_asked_for(tmp_path: Path) -> None:
    torch.save(RunsCode(tmp_path / "ran"), tmp_path / "file.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 10, 3000])
def test_a_truncated_file_is_named(step: Path, size: int) -> None:
    os.truncate(step / "__0_0.distcp", size)
    with pytest.raises(UserError, match=r"iter_0000001/__0_0\.distcp is truncated or damaged"):
        load(step)
    (step / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"iter_0000001/__0_0\.distcp is missing"):
        load(step)


def test_other_errors_keep_their_reason_without_torchs_traceback(step: Path) -> None:
    wanted = {"other": ShardedTensor.from_rank_offsets("other", torch.zeros(6))}
    with pytest.raises(RuntimeError, match="cannot load the checkpoint: .*other") as raised:
        dist_checkpointing.load(wanted, str(step), validate_access_integrity=False)
    assert "Traceback" not in str(raised.value)
