"""Deltas: exports without what they share with their base.

A delta contains the routers and new experts of an export, and with an extended vocabulary the rows of new tokens and
the tokenizer. Its `delta_config.json` lists the export's tensors in order: each comes from the base or from the delta's
safetensors, with the SHA-256 of its bytes, or is zero; a base's tensor may grow by rows of the delta. So `apply_delta`
needs no knowledge of the model's family.
"""

import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.card.model_card import CardFacts, model_card
from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.common.numbers import cast
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.hf.companions import write_companions
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE
from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.hf.safetensors_writer import Tensors, raw_bytes, write_weights
from checkpoint_convert.hf.vocabulary_rows import grow, shape_without
from moelpr.base import checksums
from moelpr.base.checksums import FileSum, Verify
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record
from moelpr.base.run_folder import HF_FOLDER
from moelpr.model.families.families import family_of
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.model.stages import VOCABULARY_PARTS

DELTA_STEM = "delta"

type Size = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True, config=STRICT)
class DeltaTensor:
    """One tensor of the export.

    Attributes:
        name: Its name in the export.
        shape: Its shape in the export.
        source: The place of its values: "base", "delta" or "zeros".
        base: Its name in the base.
        sha256: Checksum of its bytes in the export; "" for zeros.
        new_rows: First row, and the one after the last, that the delta has of a tensor of the base; None for no row.
    """

    name: str
    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
    source: Literal["base", "delta", "zeros"]
    base: str = ""
    sha256: str = ""
    new_rows: tuple[Size, Size] | None = None


@dataclass(frozen=True, config=STRICT)
class DeltaConfig(Record):
    """The export that a delta and its base are combined to.

    Attributes:
        base_model: Name of the base.
        dtype: Dtype of the export.
        max_shard_bytes: Largest size of a safetensors file of the export.
        experts: Numbers and layers of the experts, for human readers.
        config: config.json of the export.
        card: README.md of the export.
        tensors: The tensors in the order of the export; fields that are empty are omitted.
    """

    FILE_NAME: ClassVar[str] = "delta_config.json"
    REMEDY: ClassVar[str] = "copy the delta again"
    MISSING: ClassVar[str] = "is not a delta: it has no delta_config.json; moelpr model export --delta writes one"
    INDENT: ClassVar[int | None] = 1

    base_model: str
    dtype: Literal["float32", "bfloat16", "float16"]
    max_shard_bytes: Annotated[int, Field(ge=0)]
    experts: dict[str, Any]
    config: dict[str, Any]
    card: str
    tensors: Annotated[tuple[DeltaTensor, ...], Field(min_length=1)]

    def as_json(self) -> dict[str, Any]:
        tensors = [
            {key: value for key, value in vars(tensor).items() if value not in ("", None)} for tensor in self.tensors
        ]
        return {"format_version": self.format_version, **vars(self), "tensors": tensors}


def rows_of_new_tokens(source: MegatronReader) -> dict[str, range]:
    """The tensors that have rows of new tokens, and these rows."""
    if (tokens := source.spec.new_tokens) is None:
        return {}
    rows = range(tokens.first, tokens.end)
    return {name: rows for piece in source.pieces if piece.part in VOCABULARY_PARTS for name in piece.hf_names}


def trained_tensors(source: MegatronReader, tensors: Tensors) -> Tensors:
    """The tensors of an export that its base lacks; of those with rows of new tokens, these rows."""
    grown = rows_of_new_tokens(source)
    trained = {name for piece in source.pieces if piece.is_trained for name in piece.hf_names}
    shapes = {name: shape for name, shape in tensors.shapes.items() if name in trained or name in grown}
    shapes |= {name: (len(rows), *shapes[name][1:]) for name, rows in grown.items()}

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        return tensor[grown[name].start : grown[name].stop] if name in grown else tensor

    return Tensors(shapes, read)


def check_delta(facts: CardFacts) -> None:
    """Check that the model is a base with routers and new experts, and that nothing else was trained or rounded.

    Prints a note if the records of earlier training are gone, so that it is unknown.

    Raises:
        UserError: It is not, or the base's name is not recorded.
    """
    source = facts.source
    if source.spec.moe is None:
        raise UserError(f"{source.folder} is dense and has no experts for a delta; export it without --delta")
    for stage in facts.history.stages:
        if stage.trained_everything:
            raise UserError(
                f"{stage.folder} trained all parameters (--train-everything), but a delta contains only routers and "
                "new experts; export it without --delta"
            )
    if (missing := facts.history.missing) is not None:
        print(
            f"note: how {missing} was trained is not recorded; if that changed more than routers and new experts, a "
            "delta cannot restore the model",
            file=sys.stderr,
        )
    base = read_config(source.folder / HF_FOLDER)
    family, is_moe = family_of(base)
    if is_moe and (of_base := family.moe_class.architecture) != facts.architecture:
        raise UserError(
            f"a delta to a {of_base} must be of its class, but the export would be {facts.architecture}, whose tensors "
            "are joined differently; pass --as with the base's class, or export without --delta"
        )
    # A dtype between the base's and the delta's, of the conversion or of the training, has rounded frozen tensors.
    # Those with rows of new tokens are stored in the dtype of the training.
    base_dtype = base.get("dtype") or base.get("torch_dtype") or source.spec.dtype
    stored = {str(source.dtype(piece)).removeprefix("torch.") for piece in source.pieces if not piece.is_trained}
    rounded = sorted({source.spec.dtype, *stored} - {"float32", base_dtype})
    if not {*rounded} <= {facts.dtype}:
        fix = f"pass --dtype {rounded[0]}" if len(rounded) == 1 else "export without --delta"
        raise UserError(
            f"{source.folder} has {' and '.join(rounded)}, to which the base's {base_dtype} was rounded: a delta in "
            f"{facts.dtype} would not restore it; {fix}"
        )
    if facts.base_model is None:
        raise UserError("the model that this one was upcycled from is not recorded; name it with --base-model")


def complete_delta(folder: Path, facts: CardFacts, max_shard_bytes: int) -> None:
    """Write delta_config.json and the model card next to a delta's weights."""
    source = facts.source
    trained, dtype = HfReader(folder, DELTA_STEM), getattr(torch, facts.dtype)
    frozen = [piece for piece in source.pieces if not piece.is_trained]
    in_base = dict(pair for piece in frozen for names in piece.places for pair in zip(names, piece.origin, strict=True))
    grown = rows_of_new_tokens(source)
    tensors = []
    for name in tqdm(source.names, desc="checksums", unit=" tensors", leave=False, disable=None):
        shape = source.shape(name)
        if name in trained and name not in grown:
            tensors.append(DeltaTensor(name, shape, "delta", sha256=_checksum(trained.read(name))))
        elif name in in_base:
            sha256 = _checksum(cast(source.read_finite(name), dtype, name))
            rows = (grown[name].start, grown[name].stop) if name in grown else None
            tensors.append(DeltaTensor(name, shape, "base", in_base[name], sha256, rows))
        else:
            tensors.append(DeltaTensor(name, shape, "zeros"))
    assert facts.base_model is not None and source.spec.moe is not None
    card, experts = model_card(facts), asdict(source.spec.moe)
    content: Any = facts.base_model, facts.dtype, max_shard_bytes, experts, facts.config, card, tuple(tensors)
    DeltaConfig(*content).write(folder)
    sums = checksums.read(folder) or {}
    checksums.write(
        folder, sums | {DeltaConfig.FILE_NAME: FileSum.of(folder / DeltaConfig.FILE_NAME)}
    )  # it says what the export contains
    if grown:
        hf = source.folder / HF_FOLDER
        write_companions(folder, hf, hf, facts.config, card)
        for name in (CONFIG_FILE, BASE_CARD_FILE):  # the first is in delta_config.json, the second comes from the base
            (folder / name).unlink(missing_ok=True)
    (folder / CARD_FILE).write_text(model_card(facts, is_delta=True), encoding="utf-8")


def apply_delta(
    base: Path, delta: Path, save: Path, overwrite: bool = False, verify: Verify = Verify.FULL
) -> DeltaConfig:
    """Combine a base and a delta to the export that the delta was made from; an interrupted call resumes.

    Raises:
        UserError: the delta is damaged, or `base` is not its base; `save` is then unchanged.
    """
    check_output(save, [base, delta], overwrite, (CONFIG_FILE,))
    checksums.Verifier(delta, "copy the delta again", verify).verify(DeltaConfig.FILE_NAME)
    config = DeltaConfig.read(delta)
    read_config(base)
    readers = {"base": HfReader(base, verify=verify), "delta": HfReader(delta, DELTA_STEM, verify)}
    listed = {tensor.name: tensor for tensor in config.tensors}
    dtype = getattr(torch, config.dtype)

    def fail(tensor: DeltaTensor, reason: str) -> UserError:
        if tensor.source == "delta":
            return UserError(f"{delta} is damaged: {tensor.name} {reason}; copy the delta again")
        return UserError(
            f"{base} is not {config.base_model}, the base of {delta}, as it was when the delta was made: {tensor.base} "
            f"{reason}; pass the right model as --base"
        )

    def read(name: str) -> Tensor:
        tensor = listed[name]
        if tensor.source == "zeros":
            return torch.zeros(tensor.shape, dtype=dtype)
        values = readers[tensor.source].read(tensor.base or name).to(dtype)
        if tensor.new_rows is not None:
            values = grow(values, readers["delta"].read(name).to(dtype), range(*tensor.new_rows))
        if _checksum(values) != tensor.sha256:
            raise fail(tensor, "has another checksum")
        return values

    for tensor in config.tensors:
        if tensor.source != "zeros":
            reader, name = readers[tensor.source], tensor.base or tensor.name
            rows = range(*tensor.new_rows or (0, 0))
            if name not in reader or shape_without(reader.shape(name), rows) != shape_without(tensor.shape, rows):
                raise fail(tensor, "is missing or has another shape")
            if rows and (tensor.name not in readers["delta"] or len(rows) != readers["delta"].shape(tensor.name)[0]):
                raise fail(replace(tensor, source="delta"), "is missing or has another shape")
    tensors = Tensors({tensor.name: tensor.shape for tensor in config.tensors}, read)
    with output_folder(save, overwrite, tensors.num_bytes(dtype), [base, delta]) as (folder, journal, bar):
        is_extended = any(tensor.new_rows is not None for tensor in config.tensors)
        write_companions(folder, delta if is_extended else base, base, config.config, config.card)
        write_weights(journal, tensors, dtype, config.max_shard_bytes, bar)
    return config


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
