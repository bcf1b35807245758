from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import TorchDistWriter
from moelpr.model.model_spec import ModelSpec
from moelpr.train.starting_weights import starting_weights

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def run(tmp_path: Path, moe_spec: ModelSpec) -> Path:
    with TorchDistWriter(tmp_path / "iter_0000003") as writer:
        writer.finish({"iteration": 3})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    moe_spec.write(tmp_path)
    return tmp_path


def settings(run: Path, is_resumed: bool) -> Any:
    start = SimpleNamespace(checkpoint=run, selected_step=None, is_resumed=is_resumed, pretrained=None)
    return SimpleNamespace(start=start, save_trained_only=False)


def legacy(step: Path) -> None:
    """Megatron prints that it could not load this, and exits with code 0."""
    for path in step.iterdir():
        path.unlink()
    (step / "mp_rank_00").mkdir()
    (step / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"unreadable")


@pytest.mark.parametrize("is_resumed", [False, True])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (legacy, "not a complete torch_dist checkpoint"),
        (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
        (lambda step: (step / ".metadata").write_bytes((step / ".metadata").read_bytes()[:50]), ".metadata is damaged"),
        (lambda step: (step / "metadata.json").unlink(), "metadata.json is missing"),
        (lambda step: (step / "metadata.json").write_text("{"), "metadata.json"),
        (lambda step: (step / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "torch_dist"),
    ],
)
def test_an_unreadable_step_is_named_at_start_and_on_resume(run: Path, is_resumed: bool, damage, named: str) -> None:  # noqa: ANN001
    starting_weights(settings(run, is_resumed), Namespace())
    damage(run / "iter_0000003")
    with pytest.raises(UserError, match=f"iter_0000003.*{named}"):
        starting_weights(settings(run, is_resumed), Namespace())
