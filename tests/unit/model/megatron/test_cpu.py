import argparse
import subprocess
import sys

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.training.arguments import add_megatron_arguments

from moelpr.model.megatron import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched if there is a GPU")


def test_cpu_arguments_are_arguments_of_megatron() -> None:
    names = {action.dest for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions}
    assert set(cpu.CPU_ARGUMENTS) <= names


def test_the_trainer_starts_without_the_compiler() -> None:
    """Its import takes seconds, in every rank."""
    script = (
        "import sys; from moelpr.model.megatron import cpu; cpu.install(); import moelpr.train.train; "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]); "
        "import torch._dynamo.trace_rules as rules; rules.get_torch_obj_rule_map()"  # others may still import it
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n" and done.returncode == 0, done.stderr


def test_megatrons_random_number_tracker_forks_the_cpu_generator() -> None:
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with tracker.fork("dropout"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork("dropout"):
        second = torch.rand(3)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)
