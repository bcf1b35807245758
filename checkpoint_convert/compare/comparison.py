"""Compares two models, tensor by tensor and by their fp32 logits on real text.

Two tensors are in memory at a time. For logits, transformers runs a Hugging Face model and the trainer's model code a
Megatron checkpoint; one model is in memory at a time, and the logits of the first are stored in a temporary file.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpoint_convert.hf.hf_folder import TOKENIZER_FILES, HfReader, is_unread
from checkpoint_convert.hf.new_rows import new_rows, shape_without, tokenizer_folder, without_rows
from checkpoint_convert.mcore.megatron_folder import MegatronReader
from moelpr.data.tokenizer import open_hf_tokenizer
from moelpr.evaluate.models import is_megatron, open_model
from moelpr.families.families import Family, family_named, read_base, read_config
from moelpr.families.moe_classes import MOE_CLASSES, MoeClass
from moelpr.families.tables import Piece, pieces
from moelpr.model_spec import ModelSpec
from moelpr.process.errors import UserError
from moelpr.stages import VOCABULARY_PARTS, Part
from moelpr.store.checksums import Verify
from moelpr.store.documents import read_documents

# Elements that are compared at a time, to bound the memory of fp32 copies.
CHUNK_ELEMENTS = 16 << 20
# Upper bound, to limit how much of a plain text is read.
CHARACTERS_PER_TOKEN = 32

# --- tensors


@dataclass(frozen=True)
class TensorVerdict:
    """The comparison of one tensor of A with B's.

    Attributes:
        kind: "missing" in B, "extra" in B, "shape", or "value".
        max_abs: Largest absolute difference; inf if one of them is NaN or Inf.
        num_different: Number of elements whose bits differ, of `num_elements`.
        detail: Both shapes, for kind "shape".
        num_ignored_rows: Rows of new tokens, which were not compared.
    """

    name: str
    kind: str
    max_abs: float = 0.0
    num_different: int = 0
    num_elements: int = 0
    detail: str = ""
    num_ignored_rows: int = 0

    def differs(self, tolerance: float) -> bool:
        """Whether the tensors differ; with tolerance 0 every bit counts, including the sign of a zero."""
        if self.kind != "value":
            return True
        return self.max_abs > tolerance if tolerance else self.num_different > 0


class Reader(Protocol):
    """The tensors of a model under their Hugging Face names."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


def open_tensors(
    model: Path, moe_class: MoeClass | None = None, verify: Verify = Verify.FULL
) -> HfReader | MegatronReader:
    """A reader of the model, without the tensors that readers ignore.

    Args:
        moe_class: Whose names the tensors of a checkpoint get, if it can hold them.
    """
    if is_megatron(model):
        is_held = moe_class is not None and moe_class.misfit(ModelSpec.read(model)) is None
        return MegatronReader(model, moe_class=moe_class if is_held else None, verify=verify)
    is_tied = read_config(model).get("tie_word_embeddings", False)
    reader = HfReader(model, verify=verify)
    reader.names = [
        name for name in reader.names if (name == "lm_head.weight" and not is_tied) or not is_unread(reader, name)
    ]
    return reader


def _moe_class(model: Path) -> MoeClass | None:
    """The MoE class of a Hugging Face directory; None for a dense model or a checkpoint."""
    architectures = [] if is_megatron(model) else read_config(model).get("architectures")
    return next((kind for kind in MOE_CLASSES.values() if [kind.architecture] == architectures), None)


def compare(a: Path, b: Path, verify: Verify = Verify.FULL) -> Iterator[TensorVerdict]:
    """Compare all tensors of two models, each a Hugging Face model or a Megatron checkpoint."""
    in_a, in_b = open_tensors(a, _moe_class(b), verify), open_tensors(b, _moe_class(a), verify)
    for reader, other in ((in_a, in_b), (in_b, in_a)):
        if isinstance(reader, HfReader):
            reader.list_parts(other.names)
    yield from compare_tensors(in_a, in_b, {name: name for name in in_a.names}, in_a.names)
    for name in sorted(set(in_b.names) - set(in_a.names)):
        yield TensorVerdict(name, "extra")


def pieces_since(base: Path, upcycled: Path) -> tuple[MoeClass, list[Piece]]:
    """The pieces of an upcycled model; what was made of the base, in one round or several, has its origin there.

    Returns:
        The MoE class whose names the pieces have, and the pieces.

    Raises:
        UserError: the base has no fewer experts, or both are Hugging Face models of different MoE classes.
    """
    (base_family, base_spec), (family, spec) = _read_spec(base), _read_spec(upcycled)
    if is_megatron(upcycled) and base_spec.moe is not None:
        family = family.written_as(base_family.moe_class)  # the checkpoint takes the base's names
    elif base_spec.moe is not None and not is_megatron(base):
        first, second = (kind.moe_class.architecture for kind in (base_family, family))
        if first != second:
            raise UserError(
                f"{base} is a {first} and {upcycled} a {second}, which join tensors differently; export the latter "
                "again with mcore_to_hf.py --as and the base's class, or pass its checkpoint folder"
            )
    num_places = base_spec.moe.num_experts if base_spec.moe else 1
    num_experts = spec.moe.num_experts if spec.moe else 1
    if spec.moe is None or num_experts <= num_places:
        raise UserError(
            f"{base} is not the base of {upcycled}: it must have fewer experts, got {num_places} and {num_experts}; "
            "pass the base first and the upcycled model second"
        )
    copies = spec.moe.original_copies if base_spec.moe is None else 1  # every expert of an MoE is in it by its own name
    num_new = num_experts - copies - (num_places - 1)
    moe = replace(spec.moe, num_original_experts=num_places, original_copies=copies, num_new_experts=num_new)
    return family.moe_class, list(pieces(family.table, replace(spec, moe=moe)))


def compare_frozen(base: Path, upcycled: Path, verify: Verify = Verify.FULL) -> Iterator[TensorVerdict]:
    """Compare the base's tensors that training must not change with those they became in the upcycled model.

    Of embedding and output layer, the rows of tokens that the base lacks are ignored.
    """
    moe_class, plan = pieces_since(base, upcycled)
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


def largest_difference(verdicts: Iterable[TensorVerdict]) -> float:
    """Largest absolute difference; inf if tensors are missing or misshapen."""
    return max((v.max_abs if v.kind == "value" else math.inf for v in verdicts), default=0.0)


def _read_spec(model: Path) -> tuple[Family, ModelSpec]:
    if is_megatron(model):
        spec = ModelSpec.read(model)
        return family_named(spec.family), spec
    return read_base(model)


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


# --- logits


@dataclass(frozen=True)
class TextVerdict:
    """The comparison of two models' logits on one file.

    Attributes:
        max_abs_logit_diff: Largest absolute difference over all tokens and the vocabulary; inf if one is NaN.
        num_same_choice: Number of tokens after which both models predict the same next token.
    """

    file: Path
    num_tokens: int
    max_abs_logit_diff: float
    num_same_choice: int


def compare_on_text(
    a: Path,
    b: Path,
    files: list[Path],
    num_tokens: int = 1024,
    sequence_length: int = 128,
    verify: Verify = Verify.FULL,
) -> list[TextVerdict]:
    """Compare both models' logits on text; of two vocabularies, one an extension of the other, those of the old tokens.

    Args:
        a: Hugging Face model or Megatron checkpoint; so is `b`.
        files: JSON lines with "text" (.jsonl, .json), or plain text.
        num_tokens: Tokens of each file, from its start.
        sequence_length: Length of a sequence in tokens; a model with a shorter context shortens it.

    Raises:
        UserError: a file has no text, the vocabularies of the models differ in another way, or their tokenizers give
            the text different tokens.
    """
    shape_a, shape_b = _shape(a), _shape(b)
    added = new_rows(a, b) or new_rows(b, a)
    vocab_size = added.start if added else shape_a["vocab_size"]
    if not added and vocab_size != shape_b["vocab_size"]:
        raise UserError(
            f"--text requires two models with the same vocabulary, got {vocab_size} tokens in {a} and "
            f"{shape_b['vocab_size']} in {b}; remove --text"
        )
    length = min(sequence_length, shape_a["max_position_embeddings"], shape_b["max_position_embeddings"])
    sequences = [
        (file, sequence)
        for file, ids in zip(files, _token_ids(a, b, files, num_tokens, bool(added)), strict=True)
        for sequence in torch.tensor(ids).split(length)
    ]
    tokens = [sequence for _, sequence in sequences]
    largest, same, counts = dict.fromkeys(files, 0.0), dict.fromkeys(files, 0), dict.fromkeys(files, 0)
    with tempfile.TemporaryFile() as stored:
        for logits in _logits(a, tokens, vocab_size, verify):
            stored.write(memoryview(logits.numpy()).cast("B"))
        stored.seek(0)
        for (file, sequence), logits_b in zip(sequences, _logits(b, tokens, vocab_size, verify), strict=True):
            logits_a = torch.empty(len(sequence), vocab_size)
            stored.readinto(memoryview(logits_a.numpy()).cast("B"))
            counts[file] += len(sequence)
            same[file] += int((logits_a.argmax(dim=-1) == logits_b.argmax(dim=-1)).sum())
            difference = logits_a.sub_(logits_b).abs_().max().item()
            largest[file] = max(largest[file], math.inf if math.isnan(difference) else difference)
    return [TextVerdict(file, counts[file], largest[file], same[file]) for file in files]


def _shape(model: Path) -> dict[str, Any]:
    if is_megatron(model):
        return ModelSpec.read(model).megatron_args
    config = read_config(model)
    for name in ("vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(name), int):
            raise UserError(f"{model}/config.json is not that of a language model: it has no {name}")
    return config


def _token_ids(a: Path, b: Path, files: list[Path], num_tokens: int, is_extended: bool) -> list[list[int]]:
    """The first `num_tokens` of each file with the models' tokenizers, which must agree."""
    texts = [_read_text(file, num_tokens) for file in files]
    ids = []
    for model in (a, b):
        folder = tokenizer_folder(model)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"--text requires a tokenizer, but {folder} contains none; copy the base's tokenizer there")
        tokenizer = open_hf_tokenizer(folder)
        ids.append([tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens] for text in texts])
    if ids[0] != ids[1]:
        fix = "pass text of the original languages, which has no new tokens, or remove --text"
        raise UserError(
            f"--text requires text that both tokenizers tokenize alike, but those of {a} and {b} tokenize this text "
            f"differently; {fix if is_extended else 'remove --text'}"
        )
    return ids[0]


def _read_text(file: Path, num_tokens: int) -> str:
    if file.suffix in (".jsonl", ".json"):
        return "\n".join(read_documents(file, max_documents=num_tokens))  # a document has at least one token
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(CHARACTERS_PER_TOKEN * num_tokens)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot read {file} ({reason}); pass JSON lines or plain text as --text") from error
    if not text.strip():
        raise UserError(f"{file} contains no text; pass JSON lines or plain text as --text")
    return text


def _logits(model: Path, sequences: list[Tensor], vocab_size: int, verify: Verify) -> Iterator[Tensor]:
    """fp32 logits [tokens, vocabulary] of each sequence; the model is in memory until the last one is yielded."""
    with open_model(model, dtype="float32", verify=verify) as loaded:
        for sequence in sequences:
            with torch.inference_mode():
                logits = loaded.logits(sequence[None].to(loaded.device))
            yield logits[0, :, :vocab_size].float().cpu().contiguous()
