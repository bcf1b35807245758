"""How ranks meet before Megatron starts."""

import os
import subprocess
import sys


def test_a_single_rank_needs_no_free_port(taken_port: int) -> None:
    """Another program may take any port between its choice and its use."""
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    code = "from moelpr.megatron_patches import bootstrap; bootstrap.connect_ranks(); import torch\n"
    code += "torch.distributed.barrier(torch.distributed.new_group([0])); print(torch.distributed.get_world_size())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_a_port_that_is_taken_before_several_ranks_meet_is_one_sentence(taken_port: int) -> None:
    where = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    code = "from moelpr.megatron_patches import bootstrap; from moelpr.process.command import run_command\n"
    code += "run_command(bootstrap.connect_ranks)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"-c: error: port {taken_port} is taken"), done.stderr
