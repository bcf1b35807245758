"""Compare two models, each a Hugging Face folder or a Megatron checkpoint: tensor by tensor, and on real text.

    python -m checkpoint_convert.verify A B [--text FILE …]
    python -m checkpoint_convert.verify --frozen BASE UPCYCLED [--text FILE …]

Exit code 0 if they are equal within the tolerances, 1 if they differ, 2 for bad input. With --frozen, every tensor of
the base is compared with what must not have changed in the upcycled model (attention, norms, embeddings, original
experts); routers and new experts are left out. Tensors stream: two of them are in memory at a time.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from checkpoint_convert.hf_folder import HfReader, is_unread
from checkpoint_convert.logits_on_text import TextVerdict, compare_on_text
from checkpoint_convert.megatron_folder import MegatronReader
from moelpr.errors import UserError, run_command
from moelpr.families.families import Family, family_named, family_of
from moelpr.families.hf_config import read_config
from moelpr.families.tables import frozen_name
from moelpr.model_spec import FILE_NAME, ModelSpec

DEFAULT_LOGIT_TOLERANCE = 1e-4
SHOWN_ROWS = 20
# So many elements are compared at a time: three fp32 copies of a large embedding would be most of the memory.
CHUNK_ELEMENTS = 16 << 20


class Tensors(Protocol):
    """A model's tensors under their Hugging Face names."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


class HfTensors(HfReader):
    """A Hugging Face folder's tensors, without those that no reader looks at."""

    def __init__(self, folder: Path):
        is_tied = read_config(folder).get("tie_word_embeddings", False)
        super().__init__(folder)
        self._names = [
            name for name in super().names if (name == "lm_head.weight" and not is_tied) or not is_unread(self, name)
        ]

    @property
    def names(self) -> list[str]:
        return self._names


@dataclass(frozen=True)
class Verdict:
    """One tensor of A against B's: "missing" in B, "extra" in B, "shape", or "value".

    max_abs: largest absolute difference; inf where one of them is NaN or infinite. num_different: elements whose bits
    differ, of num_elements.
    """

    name: str
    kind: str
    max_abs: float = 0.0
    num_different: int = 0
    num_elements: int = 0
    detail: str = ""

    def differs(self, tolerance: float) -> bool:
        """Without tolerance every bit counts, also the sign of a zero."""
        if self.kind != "value":
            return True
        return self.max_abs > tolerance if tolerance else self.num_different > 0


def open_model(path: Path, iteration: int | None = None) -> Tensors:
    """The tensors of a Hugging Face folder or of a Megatron checkpoint folder."""
    if (path / FILE_NAME).is_file():
        return MegatronReader(path, iteration)
    return HfTensors(path)


def compare(a: Tensors, b: Tensors) -> Iterator[Verdict]:
    """A verdict for every tensor of either model."""
    yield from _compare(a, b, {name: name for name in a.names}, a.names)
    for name in sorted(set(b.names) - set(a.names)):
        yield Verdict(name, "extra")


def compare_frozen(base: Path, upcycled: Path) -> Iterator[Verdict]:
    """A verdict for every tensor of `base` that training must leave alone, against the one of `upcycled` it became."""
    num_original, num_experts = _num_experts_at(base), _num_experts_at(upcycled)
    if num_original >= num_experts:
        raise UserError(
            f"{base} is not what {upcycled} was upcycled from: it has no fewer experts ({num_original} and "
            f"{num_experts}); with --frozen, give the base first and the upcycled model second"
        )
    a, b, table = open_model(base), open_model(upcycled), _family_at(upcycled).table
    became = {frozen_name(table, name, num_original): name for name in b.names}
    names = [name for name in a.names if frozen_name(table, name, num_original) is not None]  # routers are trained
    yield from _compare(a, b, {origin: name for origin, name in became.items() if origin is not None}, names)


def max_abs_difference(a: Path, b: Path) -> float:
    """Largest absolute difference over all tensors of two models; inf if tensors are missing or shapes differ."""
    return largest_difference(list(compare(open_model(a), open_model(b))))


def frozen_max_abs_difference(base: Path, upcycled: Path) -> float:
    """Largest absolute difference between the dense base's tensors and their frozen copies; inf if one is missing."""
    return largest_difference(list(compare_frozen(base, upcycled)))


def largest_difference(verdicts: list[Verdict]) -> float:
    return max((v.max_abs if v.kind == "value" else math.inf for v in verdicts), default=0.0)


def _num_experts_at(model: Path) -> int:
    """Of an MoE layer; 1 for a dense model."""
    if (model / FILE_NAME).is_file():
        moe = ModelSpec.read(model).moe
        return moe.num_experts if moe else 1
    config = read_config(model)
    return config.get("num_experts") or config.get("num_local_experts") or 1


def _family_at(upcycled: Path) -> Family:
    if (upcycled / FILE_NAME).is_file():
        return family_named(ModelSpec.read(upcycled).family)
    return family_of(read_config(upcycled))[0]


def _compare(a: Tensors, b: Tensors, name_in_b: dict[str, str], names: list[str]) -> Iterator[Verdict]:
    """A verdict for each of A's `names`.

    In the order that suits a Megatron checkpoint, where one is: it reads each of its chunks once in that order.
    """
    in_a, in_b = set(names), set(b.names)
    if isinstance(b, MegatronReader) and not isinstance(a, MegatronReader):
        name_in_a = {other: name for name, other in name_in_b.items()}
        names = [name_in_a[other] for other in b.names if name_in_a.get(other) in in_a]
        names += sorted(in_a - set(names))
    for name in names:
        other = name_in_b.get(name)
        if other is None or other not in in_b:
            yield Verdict(name, "missing")
        elif a.shape(name) != b.shape(other):
            yield Verdict(name, "shape", detail=f"{list(a.shape(name))} and {list(b.shape(other))}")
        else:
            yield _compare_values(name, a.read(name), b.read(other))


def _compare_values(name: str, a: Tensor, b: Tensor) -> Verdict:
    largest, num_different = 0.0, 0
    for x, y in zip(a.reshape(-1).split(CHUNK_ELEMENTS), b.reshape(-1).split(CHUNK_ELEMENTS), strict=True):
        x, y = x.float(), y.float()  # float32 holds every fp16 and bf16 number exactly
        differing = x.view(torch.int32) != y.view(torch.int32)
        if differing.any():
            num_different += int(differing.sum())
            difference = (x - y)[differing].abs().max().item()
            # A NaN is a difference, and max() over several would lose it.
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return Verdict(name, "value", largest, num_different, a.numel())


# -------------------------------------------------------------------------------------------------------- report


def _tensor_table(wrong: list[Verdict], limit: int | None) -> list[list[str]]:
    """What is missing or misshapen, then the largest differences."""
    ordered = sorted(wrong, key=lambda v: (v.kind == "value", -v.max_abs))
    rows = [["tensor", "difference", "largest", "elements that differ"]]
    for v in ordered[:limit]:
        if v.kind == "value":
            rows.append([v.name, "value", f"{v.max_abs:.3e}", f"{v.num_different:,} of {v.num_elements:,}"])
        else:
            rows.append([v.name, v.kind, "", v.detail])
    return rows


def _text_table(texts: list[TextVerdict]) -> list[list[str]]:
    rows = [["text", "tokens", "largest logit difference", "same next token"]]
    for t in texts:
        share = f"{t.num_same_choice:,} ({t.num_same_choice / t.num_tokens:.2%})"
        rows.append([str(t.file), f"{t.num_tokens:,}", f"{t.max_abs_logit_diff:.3e}", share])
    return rows


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_report(verdicts: list[Verdict], wrong: list[Verdict], texts: list[TextVerdict], show_all: bool) -> None:
    if wrong:
        limit = None if show_all else SHOWN_ROWS
        _print_table(_tensor_table(wrong, limit))
        if limit is not None and len(wrong) > limit:
            print(f"… and {len(wrong) - limit:,} more; --all shows them")
        print()
    if texts:
        _print_table(_text_table(texts))
        print()
    largest = max((v.max_abs for v in verdicts if v.kind == "value"), default=0.0)
    print(f"{len(verdicts):,} tensors, {len(wrong):,} differ, largest absolute difference {largest:.3e}")


def _as_json(verdicts: list[Verdict], wrong: list[Verdict], texts: list[TextVerdict], is_equal: bool) -> str:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no infinity

    content = {
        "equal": is_equal,
        "num_tensors": len(verdicts),
        "different_tensors": [v.name for v in wrong],
        "max_abs_diff": number(largest_difference(verdicts)),
    }
    if texts:
        num_tokens = sum(t.num_tokens for t in texts)
        content |= {
            "max_abs_logit_diff": number(max(t.max_abs_logit_diff for t in texts)),
            "num_tokens": num_tokens,
            "same_next_token": sum(t.num_same_choice for t in texts) / num_tokens,
        }
    return json.dumps(content)


# ------------------------------------------------------------------------------------------------------- command


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify",
        description="Compare two models tensor by tensor and, with --text, by what they say about real text.",
        epilog="Exit code 0: equal within the tolerances, 1: they differ, 2: bad input.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("b", type=Path, metavar="B", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest absolute difference of tensors that counts as equal (default: 0, every bit)",
    )
    parser.add_argument(
        "--frozen", action="store_true", help="A is the base: compare it with what is frozen in the upcycled B"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help='also compare fp32 logits on these texts: JSON lines with "text" (.jsonl) or plain text',
    )
    parser.add_argument(
        "--logit-tolerance",
        type=float,
        default=DEFAULT_LOGIT_TOLERANCE,
        help="largest absolute difference of logits that counts as equal (default: %(default)s)",
    )
    parser.add_argument("--num-tokens", type=int, default=1024, help="tokens of each text (default: %(default)s)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=128,
        help="tokens; shorter where a model's context is shorter (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help=f"show all tensors that differ, not only {SHOWN_ROWS}")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the tables")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def _check_arguments(args: argparse.Namespace) -> None:
    for flag in ("tolerance", "logit_tolerance"):
        if not getattr(args, flag) >= 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must not be negative")
    for flag in ("num_tokens", "sequence_length"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")


def main() -> None:
    args = _parse_arguments()
    _check_arguments(args)
    compared = compare_frozen(args.a, args.b) if args.frozen else compare(open_model(args.a), open_model(args.b))
    verdicts = list(compared)
    wrong = [verdict for verdict in verdicts if verdict.differs(args.tolerance)]
    texts = []
    if args.text:
        texts = compare_on_text(args.a, args.b, args.text, args.num_tokens, args.sequence_length)
    is_equal = not wrong and all(text.max_abs_logit_diff <= args.logit_tolerance for text in texts)
    if args.json:
        print(_as_json(verdicts, wrong, texts, is_equal))
    else:
        _print_report(verdicts, wrong, texts, args.all)
    if not is_equal:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
