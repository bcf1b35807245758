"""Compares a graft with what it is made of."""

from collections.abc import Iterator
from pathlib import Path

from checkpoint_convert.compare.tensors import TensorVerdict, compare_tensors
from checkpoint_convert.conversions.graft_record import Graft
from checkpoint_convert.conversions.instruct_difference import GraftReader
from checkpoint_convert.conversions.origins import open_tensors
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from moelpr.store.checksums import Verify


def compare_graft(
    base: Path, instruct: Path, model: Path, grafted: Path, verify: Verify = Verify.FULL
) -> Iterator[TensorVerdict]:
    """Compare the model plus the difference with a graft, whose graft.json has scale and parts."""
    record, found = Graft.read(grafted), open_tensors(grafted, verify=verify)
    assert isinstance(found, HfReader)
    dtype = common_dtype((found, name) for name in found.names)
    expected = GraftReader(base, instruct, model, record.scale, record.only, dtype, verify)
    found.list_parts(expected.names)
    yield from compare_tensors(expected, found, {name: name for name in expected.names}, expected.names)
    for name in sorted(set(found.names) - set(expected.names)):
        yield TensorVerdict(name, "extra")
