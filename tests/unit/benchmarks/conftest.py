"""A model spec of the sizes that the step benchmarks accept."""

import argparse

import pytest

from moelpr.model.megatron import bootstrap
from moelpr.model.model_spec import ModelSpec
from tests.support.hf_models import make_model  # noqa: F401

bootstrap.install_patches()  # before the tests of this folder import Megatron


@pytest.fixture(scope="package")
def spec(megatron: None) -> ModelSpec:
    from benchmarks.optimizer_steps import spec_of

    sizes = {"layers": 2, "hidden": 32, "ffn": 48, "head": 8, "vocabulary": 64, "length": 16}
    return spec_of(argparse.Namespace(**sizes, new_experts=3, original_copies=1, topk=2))
