"""The stand-in for Transformer Engine has the signatures of the package, which is read and not imported.

    python -m pip download --no-deps --dest FOLDER transformer_engine
    TRANSFORMER_ENGINE_SOURCE=FOLDER/transformer_engine-….whl python -m pytest tests/fake_gpu/test_stub_signatures.py

Without the variable and without an installed package, it is skipped.
"""

import ast
import importlib.util
import inspect
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_gpu import transformer_engine_stub as stub

MODULES = "pytorch/module"
PLACES = {
    "Linear": f"{MODULES}/linear.py",
    "LayerNormLinear": f"{MODULES}/layernorm_linear.py",
    "GroupedLinear": f"{MODULES}/grouped_linear.py",
    "RMSNorm": f"{MODULES}/rmsnorm.py",
    "DotProductAttention": "pytorch/attention/dot_product_attention/dot_product_attention.py",
    "FusedAdam": "pytorch/optimizers/fused_adam.py",
    "get_dummy_wgrad": f"{MODULES}/base.py",
}
PLACES |= dict.fromkeys("moe_permute moe_permute_with_probs moe_unpermute".split(), "pytorch/permutation.py")
SORTS = "moe_sort_chunks_by_index moe_sort_chunks_by_index_with_probs"
PLACES |= dict.fromkeys(SORTS.split(), "pytorch/permutation.py")
ROUTING = "fused_topk_with_score_function fused_compute_score_for_moe_aux_loss fused_moe_aux_loss"
PLACES |= dict.fromkeys(ROUTING.split(), "pytorch/router.py")


@pytest.fixture(scope="module")
def source() -> Callable[[str], str]:
    """Reads a file of the package: installed, or in the wheel or folder that the variable names."""
    if named := os.environ.get("TRANSFORMER_ENGINE_SOURCE"):
        if named.endswith(".whl"):
            wheel = zipfile.ZipFile(named)
            return lambda path: wheel.read(f"transformer_engine/{path}").decode()
        return lambda path: (Path(named) / path).read_text()
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        pytest.skip("Transformer Engine is not installed, and TRANSFORMER_ENGINE_SOURCE names no wheel of it")
    return lambda path: (Path(spec.origin).parent / path).read_text()


def parameters_of(tree: ast.Module, name: str, method: str | None) -> dict[str, str | None]:
    """Parameter → default as in the source, in order; None: it has none."""
    body = [node for node in tree.body if getattr(node, "name", None) == name]
    if method is not None:
        body = [node for node in body[-1].body if getattr(node, "name", None) == method]  # type: ignore[attr-defined]
    arguments = body[-1].args  # type: ignore[attr-defined]
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*map(ast.unparse, arguments.defaults)]
    keyword = [None if default is None else ast.unparse(default) for default in arguments.kw_defaults]
    names = [argument.arg for argument in (*positional, *arguments.kwonlyargs)]
    return {name: default for name, default in zip(names, [*defaults, *keyword], strict=True) if name != "self"}


def stubs_parameters(function: Callable) -> dict[str, str | None]:
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind != one.VAR_KEYWORD]
    return {
        one.name: None if one.default is one.empty else repr(one.default) for one in parameters if one.name != "self"
    }


@pytest.mark.parametrize("name", PLACES)
def test_the_stub_has_the_packages_parameters(source: Callable[[str], str], name: str) -> None:
    """Those that it has, in the package's order and with its defaults; whatever it lacks has a default."""
    tree, ours = ast.parse(source(PLACES[name])), getattr(stub, name)
    for method in ("__init__", "forward") if inspect.isclass(ours) else (None,):
        if (name, method) in (("RMSNorm", "forward"), ("FusedAdam", "forward")):
            continue  # inherited, or not there
        theirs = parameters_of(tree, name, method)
        found = stubs_parameters(getattr(ours, method) if method else ours)
        assert list(found) == [parameter for parameter in theirs if parameter in found]
        for parameter, default in found.items():
            expected = theirs[parameter]
            assert (default is None) == (expected is None), parameter
            assert expected is None or ast.literal_eval(default) == ast.literal_eval(expected), parameter
        assert all(default is not None for parameter, default in theirs.items() if parameter not in found)


def test_the_package_has_an_empty_extra_state_and_refuses_zero_rows(source: Callable[[str], str]) -> None:
    assert "torch.empty(0, dtype=torch.uint8)" in source(f"{MODULES}/base.py")
    assert "torch.empty(0, dtype=torch.uint8)" in source("pytorch/ops/op.py")
    assert "num_out_tokens > 0" in source("pytorch/permutation.py")
    assert 'f"weight{i}"' in source(f"{MODULES}/grouped_linear.py")
