"""Compare two models, tensor by tensor; two tensors are in memory at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.card.graft_record import Graft
from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.common.numbers import CHUNK_ELEMENTS
from checkpoint_convert.conversions.instruct_difference import GraftReader
from checkpoint_convert.conversions.model_pairs import Described, moe_class_of, open_tensors, pieces_since
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.vocabulary_rows import new_rows, shape_without, without_rows
from moelpr.base.checksums import Verify
from moelpr.model.stages import VOCABULARY_PARTS, Part


@dataclass(frozen=True)
class TensorVerdict:
    """The comparison of one tensor of A with B's."""

    name: str
    kind: str  # "missing" in B, "extra" in B, "shape", or "value"
    max_abs: float = 0.0  # largest absolute difference; inf if one of them is NaN or Inf
    num_different: int = 0  # number of elements whose bits differ, of `num_elements`
    num_elements: int = 0
    detail: str = ""  # both shapes, for kind "shape"
    num_ignored_rows: int = 0  # rows of new tokens, which were not compared

    def differs(self, tolerance: float) -> bool:
        """Whether the tensors differ; with tolerance 0 every bit counts, including the sign of a zero."""
        if self.kind != "value":
            return True
        return self.max_abs > tolerance if tolerance else self.num_different > 0


Reader = HfReader | MegatronReader | GraftReader


def compare(a: Path, b: Path, verify: Verify = Verify.FULL) -> Iterator[TensorVerdict]:
    """Compare all tensors of two models, each a Hugging Face model or a Megatron checkpoint."""
    in_a, in_b = open_tensors(a, moe_class_of(b), verify), open_tensors(b, moe_class_of(a), verify)
    for reader, other in ((in_a, in_b), (in_b, in_a)):
        if isinstance(reader, HfReader):
            reader.list_parts(other.names)
    yield from _compare_all(in_a, in_b)


def compare_frozen(base: Path, upcycled: Path, verify: Verify = Verify.FULL) -> Iterator[TensorVerdict]:
    """Compare the base's tensors that training must not change with those they became in the upcycled model.

    Of embedding and output layer, the rows of tokens that the base lacks are ignored.
    """
    moe_class, plan = pieces_since(Described.read(base), Described.read(upcycled))
    rows = new_rows(base, upcycled)
    ignored = {name: rows for piece in plan if piece.part in VOCABULARY_PARTS for name in piece.origin}
    routers = {name for piece in plan if piece.part is Part.ROUTER for name in piece.hf_names}
    a, b = open_tensors(base, moe_class, verify), open_tensors(upcycled, moe_class, verify)
    for reader, names in (
        (a, (name for piece in plan for name in piece.origin)),
        (b, (name for piece in plan for place in piece.places for name in place)),
    ):
        if isinstance(reader, HfReader):
            reader.list_parts(names)
    became = {name: name for name in set(b.names).difference(*(names for piece in plan for names in piece.places))}
    frozen = [piece for piece in plan if not piece.is_trained]
    for piece in frozen:
        became.update(zip(piece.origin, piece.hf_names, strict=True))
    yield from compare_tensors(a, b, became, [name for name in a.names if name not in routers], ignored)
    for copy in range(1, max(len(piece.places) for piece in frozen)):
        became = dict(
            pair for piece in frozen if piece.copies for pair in zip(piece.origin, piece.places[copy], strict=True)
        )
        for verdict in compare_tensors(a, b, became, list(became)):
            yield replace(verdict, name=became[verdict.name])


def compare_graft(
    base: Path, instruct: Path, model: Path, grafted: Path, verify: Verify = Verify.FULL
) -> Iterator[TensorVerdict]:
    """Compare the model plus the difference with a graft, whose graft.json has scale and parts."""
    record, graft = Graft.read(grafted), open_tensors(grafted, verify=verify)
    assert isinstance(graft, HfReader)
    dtype = common_dtype((graft, name) for name in graft.names)
    expected = GraftReader(base, instruct, model, record.scale, record.only, dtype, verify)
    graft.list_parts(expected.names)
    yield from _compare_all(expected, graft)


def largest_difference(verdicts: Iterable[TensorVerdict]) -> float:
    """Largest absolute difference; inf if tensors are missing or misshapen."""
    return max((v.max_abs if v.kind == "value" else math.inf for v in verdicts), default=0.0)


def _compare_all(a: Reader, b: Reader) -> Iterator[TensorVerdict]:
    yield from compare_tensors(a, b, {name: name for name in a.names}, a.names)
    for name in sorted(set(b.names) - set(a.names)):
        yield TensorVerdict(name, "extra")


def compare_tensors(
    a: Reader, b: Reader, name_in_b: dict[str, str], names: list[str], ignored: Mapping[str, range] | None = None
) -> Iterator[TensorVerdict]:
    """Compare A's `names`, in the order in which a Megatron checkpoint reads each chunk once.

    Args:
        ignored: Rows of A's tensors, and of those that they are compared with, that may differ or be missing.
    """
    in_a, in_b = set(names), set(b.names)
    if isinstance(b, MegatronReader) and not isinstance(a, MegatronReader):
        name_in_a = {other: name for name, other in name_in_b.items()}
        names = [name_in_a[other] for other in b.names if name_in_a.get(other) in in_a]
        names += sorted(in_a - set(names))
    for name in names:
        other, rows = name_in_b.get(name), (ignored or {}).get(name, range(0))
        if other is None or other not in in_b:
            yield TensorVerdict(name, "missing")
        elif shape_without(a.shape(name), rows) != shape_without(b.shape(other), rows):
            yield TensorVerdict(name, "shape", detail=f"{list(a.shape(name))} and {list(b.shape(other))}")
        else:
            values = (without_rows(tensor, rows) for tensor in (a.read(name), b.read(other)))
            yield replace(_compare_values(name, *values), num_ignored_rows=len(rows))


def _compare_values(name: str, a: Tensor, b: Tensor) -> TensorVerdict:
    largest, num_different = 0.0, 0
    for x, y in zip(a.reshape(-1).split(CHUNK_ELEMENTS), b.reshape(-1).split(CHUNK_ELEMENTS), strict=True):
        x, y = x.float(), y.float()  # exact for fp16 and bf16
        differing = x.view(torch.int32) != y.view(torch.int32)
        if differing.any():
            num_different += int(differing.sum())
            difference = (x - y)[differing].abs().max().item()
            # max() over chunks would lose a NaN
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return TensorVerdict(name, "value", largest, num_different, a.numel())
