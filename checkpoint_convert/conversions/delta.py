"""Deltas: exports without what they share with their base.

A delta contains the routers and new experts of an export, and with an extended vocabulary the rows of new tokens and
the tokenizer. Its `delta_config.json` lists the export's tensors in order: each comes from the base or from the delta's
safetensors, with the SHA-256 of its bytes, or is zero; a base's tensor may grow by rows of the delta. So `apply_delta`
needs no knowledge of the model's family.
"""

import hashlib
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.card.history import check_frozen_is_the_base
from checkpoint_convert.card.model_card import CardFacts, model_card
from checkpoint_convert.common.numbers import cast
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.conversions.delta_config import DeltaConfig, DeltaTensor
from checkpoint_convert.hf.companions import write_companions
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE
from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.hf.safetensors_writer import raw_bytes, write_weights
from checkpoint_convert.hf.vocabulary_rows import grow, shape_without
from checkpoint_convert.mcore.megatron_folder import MegatronReader
from moelpr.families.families import family_of
from moelpr.families.hf_config import CONFIG_FILE, read_config
from moelpr.process.errors import UserError
from moelpr.stages import VOCABULARY_PARTS
from moelpr.store import checksums
from moelpr.store.checksums import FileSum, Verify
from moelpr.store.run_folder import HF_FOLDER

DELTA_STEM = "delta"


def rows_of_new_tokens(source: MegatronReader) -> dict[str, range]:
    """The tensors that have rows of new tokens, and these rows."""
    if (tokens := source.spec.new_tokens) is None:
        return {}
    rows = range(tokens.first, tokens.end)
    return {name: rows for piece in source.pieces if piece.part in VOCABULARY_PARTS for name in piece.hf_names}


def check_delta(source: MegatronReader, facts: CardFacts) -> None:
    """Check that the export's frozen tensors are the base's: neither rounded nor joined differently.

    Raises:
        UserError: They are not.
    """
    base = read_config(source.folder / HF_FOLDER)
    family, is_moe = family_of(base)
    if is_moe and (of_base := family.moe_class.architecture) != facts.architecture:
        raise UserError(
            f"a delta to a {of_base} must be of its class, but the export would be {facts.architecture}, whose tensors "
            "are joined differently; pass --as with the base's class, or export without --delta"
        )
    check_frozen_is_the_base(source, facts.dtype, "a delta", "export without --delta")


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
    content = facts.base_model, facts.dtype, max_shard_bytes, experts, facts.config, card, tuple(tensors)
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
        found = readers[tensor.source].read(tensor.base or name).to(dtype)
        if tensor.new_rows is not None:
            found = grow(found, readers["delta"].read(name).to(dtype), range(*tensor.new_rows))
        if _checksum(found) != tensor.sha256:
            raise fail(tensor, "has another checksum")
        return found

    for tensor in config.tensors:
        if tensor.source != "zeros":
            reader, name = readers[tensor.source], tensor.base or tensor.name
            rows = range(*tensor.new_rows or (0, 0))
            if name not in reader or shape_without(reader.shape(name), rows) != shape_without(tensor.shape, rows):
                raise fail(tensor, "is missing or has another shape")
            if rows and (tensor.name not in readers["delta"] or len(rows) != readers["delta"].shape(tensor.name)[0]):
                raise fail(replace(tensor, source="delta"), "is missing or has another shape")
    shapes = [(tensor.name, tensor.shape) for tensor in config.tensors]
    num_bytes = dtype.itemsize * sum(math.prod(shape) for _, shape in shapes)
    with output_folder(save, overwrite, num_bytes, [base, delta]) as (folder, journal, bar):
        is_extended = any(tensor.new_rows is not None for tensor in config.tensors)
        write_companions(folder, delta if is_extended else base, base, config.config, config.card)
        write_weights(journal, shapes, dtype, config.max_shard_bytes, read, bar)
    return config


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
