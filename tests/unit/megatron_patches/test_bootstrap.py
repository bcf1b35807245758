"""How ranks meet before Megatron starts."""

import os
import subprocess
import sys


def run_rank_0(world_size: int, port: int, code: str) -> subprocess.CompletedProcess[str]:
    where = {"RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = f"from moelpr.megatron_patches import bootstrap; {code}"
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True)


def test_a_single_rank_needs_no_free_port(taken_port: int) -> None:
    """Another program may take any port between its choice and its use."""
    code = "bootstrap.connect_ranks(); import torch; "
    code += "torch.distributed.barrier(torch.distributed.new_group([0])); print(torch.distributed.get_world_size())"
    done = run_rank_0(1, taken_port, code)
    assert done.stdout == "1\n", done.stderr


def test_a_port_that_is_taken_before_several_ranks_meet_is_one_sentence(taken_port: int) -> None:
    code = "from moelpr.process.command import run_command; run_command(bootstrap.connect_ranks)"
    done = run_rank_0(2, taken_port, code)
    assert done.returncode == 1 and done.stderr.startswith(f"-c: error: port {taken_port} is taken"), done.stderr
