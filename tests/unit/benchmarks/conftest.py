"""A model spec of the sizes that the step benchmarks accept."""

import argparse

import pytest

from moelpr.model_spec import ModelSpec


@pytest.fixture(scope="package")
def spec(megatron: None) -> ModelSpec:
    from benchmarks.steps import spec_of

    sizes = {"layers": 2, "hidden": 32, "ffn": 48, "head": 8, "new_experts": 3, "topk": 2, "vocabulary": 64}
    return spec_of(argparse.Namespace(**sizes, length=16))
