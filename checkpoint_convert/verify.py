"""Compare two models, each a Hugging Face model or a Megatron checkpoint: tensor by tensor, and on real text.

    moelpr model verify A B [--text FILE …]
    moelpr model verify --frozen BASE UPCYCLED [--text FILE …]
    moelpr model verify --graft BASE INSTRUCT MODEL GRAFT [--text FILE …]
    moelpr model verify EXPORT --reader llama.cpp

Exit code 0 if they are equal within the tolerances, 1 if they differ, 2 for invalid input. With --frozen, every tensor
of the base is compared with the tensor of the upcycled model that must equal it (attention, norms, embeddings,
original experts); routers, new experts and the rows of new tokens are ignored. BASE may also be the instruct model of a
graft. With --graft, every tensor of a graft is compared with what it is made of. With --reader, one export is checked
against what a program requires that is to run it (exit code 1 if it will not run as in transformers); the program need
not be installed.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from checkpoint_convert.card.readers import READERS
from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.errors import UserError
from moelpr.base.settings import POSITIONAL, File, Flags, choices, either, metavar, number, run_script
from moelpr.base.text_tables import table_text
from moelpr.data.text.reading import read_documents
from moelpr.measure.evaluate.settings import HfFolder, Source
from moelpr.measure.report.numbers import finite_json

if TYPE_CHECKING:
    from checkpoint_convert.compare.logits import TextVerdict
    from checkpoint_convert.compare.tensors import TensorVerdict

SHOWN_ROWS = 20
_Tolerance = Annotated[float, number(float, 0, below=1 << 31)]
_Tokens = Annotated[int, number(int, 1, below=1 << 31)]


class Settings(Flags):
    a: Annotated[Source, POSITIONAL, metavar("A")]  # Hugging Face directory or Megatron checkpoint folder
    b: Annotated[Source | None, POSITIONAL, metavar("B")] = None  # Hugging Face directory or Megatron checkpoint folder
    reader: Annotated[str | None, choices(READERS)] = None  # check whether this program runs the export A
    tolerance: _Tolerance = 0.0  # largest absolute difference of tensors that counts as equal
    frozen: Annotated[bool, either("kind")] = False  # compare base A with the frozen tensors of the upcycled model B
    # compare with B = A + INSTRUCT - BASE
    graft: Annotated[list[HfFolder], either("kind"), {"nargs": 2}, metavar(("BASE", "INSTRUCT"))] = []
    text: list[File] = []  # also compare fp32 logits on these texts: JSON lines or Parquet with "text"
    logit_tolerance: _Tolerance = 1e-4  # largest absolute difference of logits that counts as equal
    num_tokens: _Tokens = 1024  # tokens to compare per FILE
    sequence_length: _Tokens = 128  # tokens per sequence, at most a model's context
    all: bool = False  # list all different tensors, not only 20
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json
    json: bool = False  # print one line of JSON instead of tables

    def __post_init__(self) -> None:
        others = self.frozen or self.graft or self.text
        if (self.b is None) != (self.reader is not None) or (self.reader and others):
            raise UserError(
                "pass two models to compare them, or one export and --reader, without --frozen, --graft and --text"
            )


def main(args: Settings) -> None:
    if args.reader or args.b is None:
        _check_for_reader(args.a, args.reader or "", args.json, args.verify)
        return
    for path in args.text:
        read_documents(path, max_documents=1)  # a wrong path is reported before torch is imported
    from checkpoint_convert.compare.logits import compare_on_text
    from checkpoint_convert.compare.tensors import compare, compare_frozen, compare_graft

    if args.graft:
        base, instruct = args.graft
        verdicts = list(compare_graft(base, instruct, args.a, args.b, args.verify))
    else:
        verdicts = list((compare_frozen if args.frozen else compare)(args.a, args.b, args.verify))
    different = [verdict for verdict in verdicts if verdict.differs(args.tolerance)]
    texts = []
    if args.text:
        texts = compare_on_text(args.a, args.b, args.text, args.num_tokens, args.sequence_length, args.verify)
    is_equal = not different and all(text.max_abs_logit_diff <= args.logit_tolerance for text in texts)
    if args.json:
        print(_as_json(verdicts, different, texts, is_equal))
    else:
        _print_report(verdicts, different, texts, len(different) if args.all else SHOWN_ROWS)
    if not is_equal:
        sys.exit(1)


def _check_for_reader(export: Path, reader: str, as_json: bool, verify: Verify) -> None:
    from checkpoint_convert.compare.reader_requirements import unmet_requirements

    unmet = unmet_requirements(export, reader, verify)
    if as_json:
        print(json.dumps({"reader": reader, "runs": not unmet, "unmet": unmet}))
    else:
        print("\n".join(unmet) if unmet else f"{export} meets what {READERS[reader]} requires")
    if unmet:
        sys.exit(1)


def _print_report(
    verdicts: "list[TensorVerdict]", different: "list[TensorVerdict]", texts: "list[TextVerdict]", limit: int
) -> None:
    """Missing and misshapen tensors first, then the largest differences."""
    if different:
        rows = []
        for v in sorted(different, key=lambda v: (v.kind == "value", -v.max_abs))[:limit]:
            is_value = v.kind == "value"
            elements = f"{v.num_different:,} of {v.num_elements:,}" if is_value else v.detail
            rows.append([v.name, v.kind, f"{v.max_abs:.3e}" if is_value else "", elements])
        print(table_text(["tensor", "difference", "largest", "elements that differ"], rows, range(4)))
        print(f"… and {len(different) - limit:,} more; --all lists them\n" if len(different) > limit else "")
    if texts:
        rows = []
        for t in texts:
            same = f"{t.num_same_choice:,} ({t.num_same_choice / t.num_tokens:.2%})"
            rows.append([str(t.file), f"{t.num_tokens:,}", f"{t.max_abs_logit_diff:.3e}", same])
        print(table_text(["text", "tokens", "largest logit difference", "same next token"], rows, range(4)) + "\n")
    largest = max((v.max_abs for v in verdicts if v.kind == "value"), default=0.0)
    print(f"{len(verdicts):,} tensors, {len(different):,} differ, largest absolute difference {largest:.3e}")
    if ignored := _num_ignored_rows(verdicts):
        print(f"ignored: the rows of {ignored:,} new tokens, in embedding and output layer")


def _num_ignored_rows(verdicts: "list[TensorVerdict]") -> int:
    return max((verdict.num_ignored_rows for verdict in verdicts), default=0)


def _as_json(
    verdicts: "list[TensorVerdict]", different: "list[TensorVerdict]", texts: "list[TextVerdict]", is_equal: bool
) -> str:
    from checkpoint_convert.compare.tensors import largest_difference

    content = {
        "equal": is_equal,
        "num_tensors": len(verdicts),
        "different_tensors": [v.name for v in different],
        "max_abs_diff": largest_difference(verdicts),
        "num_ignored_rows": _num_ignored_rows(verdicts),
    }
    if texts:
        num_tokens = sum(t.num_tokens for t in texts)
        content |= {
            "max_abs_logit_diff": max(t.max_abs_logit_diff for t in texts),
            "num_tokens": num_tokens,
            "same_next_token": sum(t.num_same_choice for t in texts) / num_tokens,
        }
    return finite_json(content)


if __name__ == "__main__":
    run_script(main)
