"""Compare two models tensor by tensor, each a Hugging Face folder or a Megatron checkpoint.

    python -m checkpoint_convert.verify A B [--tolerance 0] [--frozen]

Exit code 0 if they are equal within the tolerance, 1 if they differ, 2 for bad input. With --frozen, A is the dense
base and B the upcycled model: every tensor of A is compared with what must not have changed in B (attention, norms,
embeddings, expert 0), routers and new experts are left out.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from checkpoint_convert.families import Family, family_named, moe_family_of
from checkpoint_convert.hf_folder import HfReader, read_config
from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.tables import frozen_name
from moelpr.errors import UserError, run_command
from moelpr.model_spec import FILE_NAME, ModelSpec


class Tensors(Protocol):
    """A model's tensors under their Hugging Face names."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Difference:
    """One tensor's verdict: "missing" in B, "extra" in B, "shape", or "value" with the largest absolute difference."""

    name: str
    kind: str
    max_abs: float = 0.0
    detail: str = ""


def open_model(path: Path, iteration: int | None = None) -> Tensors:
    """The tensors of a Hugging Face folder or of a Megatron checkpoint folder."""
    if (path / FILE_NAME).is_file():
        return MegatronReader(path, iteration)
    read_config(path)
    return HfReader(path)


def compare(a: Tensors, b: Tensors) -> Iterator[Difference]:
    """A verdict for every tensor of either model, in A's order."""
    yield from _compare(a, b, {name: name for name in a.names})
    for name in sorted(set(b.names) - set(a.names)):
        yield Difference(name, "extra")


def compare_frozen(base: Tensors, upcycled: Tensors, family: Family) -> Iterator[Difference]:
    """A verdict for every tensor of the dense `base` against the frozen tensor of `upcycled` that came from it."""
    frozen = {frozen_name(family.table, name): name for name in upcycled.names}
    yield from _compare(base, upcycled, {origin: name for origin, name in frozen.items() if origin is not None})


def max_abs_difference(a: Path, b: Path) -> float:
    """Largest absolute difference over all tensors of two models; inf if tensors are missing or shapes differ."""
    return _largest(compare(open_model(a), open_model(b)))


def frozen_max_abs_difference(base: Path, upcycled: Path) -> float:
    """Largest absolute difference between the dense base's tensors and their frozen copies; inf if one is missing."""
    return _largest(compare_frozen(open_model(base), open_model(upcycled), _family_at(upcycled)))


def _family_at(upcycled: Path) -> Family:
    if (upcycled / FILE_NAME).is_file():
        return family_named(ModelSpec.read(upcycled).family)
    return moe_family_of(read_config(upcycled))


def _largest(differences: Iterator[Difference]) -> float:
    return max((d.max_abs if d.kind == "value" else float("inf") for d in differences), default=0.0)


def _compare(a: Tensors, b: Tensors, name_in_b: dict[str, str]) -> Iterator[Difference]:
    in_b = set(b.names)
    for name in a.names:
        other = name_in_b.get(name)
        if other is None or other not in in_b:
            yield Difference(name, "missing")
        elif a.shape(name) != b.shape(other):
            yield Difference(name, "shape", detail=f"{list(a.shape(name))} and {list(b.shape(other))}")
        else:
            # float32 holds every fp16 and bf16 number exactly.
            difference = (a.read(name).float() - b.read(other).float()).abs()
            largest = difference.max().item() if difference.numel() else 0.0
            # A NaN is a difference, and max() over several tensors would lose it.
            yield Difference(name, "value", float("inf") if largest != largest else largest)


def _print_table(differences: list[Difference], tolerance: float) -> bool:
    """Print what differs and a summary; True if nothing does."""
    wrong = [d for d in differences if d.kind != "value" or d.max_abs > tolerance]
    width = max((len(d.name) for d in wrong), default=0)
    for d in wrong:
        print(
            f"{d.name:<{width}}  {d.kind:<7}  {d.detail or (f'{d.max_abs:.3e}' if d.kind == 'value' else '')}".rstrip()
        )
    largest = max((d.max_abs for d in differences if d.kind == "value"), default=0.0)
    print(f"{len(differences)} tensors, {len(wrong)} differ, largest absolute difference {largest:.3e}")
    return not wrong


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="verify", description="Compare two models tensor by tensor.")
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("b", type=Path, metavar="B", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest absolute difference that counts as equal (default: 0)"
    )
    parser.add_argument(
        "--frozen", action="store_true", help="A is the dense base: compare it with what is frozen in the upcycled B"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance {args.tolerance} must not be negative")
    a, b = open_model(args.a), open_model(args.b)
    differences = compare_frozen(a, b, _family_at(args.b)) if args.frozen else compare(a, b)
    if not _print_table(list(differences), args.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
