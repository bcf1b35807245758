"""How ranks meet before Megatron starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_rank_0(world_size: int, port: int, code: str) -> subprocess.CompletedProcess[str]:
    where = {"RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = f"from moelpr.model.megatron import bootstrap; {code}"
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True)


def test_a_single_rank_needs_no_free_port(taken_port: int) -> None:
    """Another program may take any port between its choice and its use."""
    code = "bootstrap.connect_ranks(); import torch; "
    code += "torch.distributed.barrier(torch.distributed.new_group([0])); print(torch.distributed.get_world_size())"
    done = run_rank_0(1, taken_port, code)
    assert done.stdout == "1\n", done.stderr


def test_a_port_that_is_taken_before_several_ranks_meet_is_one_sentence(taken_port: int) -> None:
    code = "from moelpr.base.command import run_command; run_command(bootstrap.connect_ranks)"
    done = run_rank_0(2, taken_port, code)
    assert done.returncode == 1 and done.stderr.startswith(f"-c: error: port {taken_port} is taken"), done.stderr


@pytest.mark.parametrize(
    ("content", "has_gpu"), [("raise RuntimeError('curand not found')\nmore", True), ("import no_such", False)]
)
def test_a_transformer_engine_that_cannot_be_imported(tmp_path: Path, content: str, has_gpu: bool) -> None:
    """It is one sentence with a GPU, and not there without, where Megatron would end with its error."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(content)
    code = "import sys, torch; from moelpr.model.megatron import bootstrap; "
    code += f"torch.cuda.is_available = lambda: {has_gpu}; from moelpr.base.command import run_command; "
    code += "run_command(bootstrap.install_patches); import megatron.core.extensions.transformer_engine as m; "
    code += "from moelpr.train.arguments import kernels; print(m.HAVE_TE, kernels.is_installed('transformer_engine'))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if has_gpu:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "Transformer Engine is installed but cannot be imported (" in done.stderr and ".[gpu]" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr
