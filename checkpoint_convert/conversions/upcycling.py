"""Converts a Hugging Face model to a Megatron checkpoint, dense or upcycled."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoint_convert.card.companions import copy_companions
from checkpoint_convert.card.history import Origin
from checkpoint_convert.conversions.new_tokens import read_extension, with_new_rows
from checkpoint_convert.hf.hf_folder import (
    EXTENDED_FILES,
    TOKENIZER_FILES,
    HfReader,
    check_tokenizer,
    common_dtype,
    record_dtype,
)
from checkpoint_convert.hf.hub import Model
from checkpoint_convert.hf.outputs import cast, check_finite, check_output, output_folder
from checkpoint_convert.hf.weight_check import check_weights
from checkpoint_convert.mcore.megatron_folder import SIGNS, num_elements, write_checkpoint
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.families.families import CONFIG_FILE, Family, read_base, read_config
from moelpr.families.new_experts import NewExperts, with_new_experts
from moelpr.families.tables import Piece, megatron_shape, pieces, sizes_of
from moelpr.model_spec import ModelSpec
from moelpr.process.errors import UserError
from moelpr.stages import VOCABULARY_PARTS, Part
from moelpr.store.checksums import Verify
from moelpr.store.run_folder import HF_FOLDER


@dataclass(frozen=True)
class Start:
    """How new experts and routers start.

    Attributes:
        new_experts: "copied" from the FFN (in an MoE, from expert 0), or "random": normal with the standard deviation
            `initializer_range` of the model, an ablation of the paper.
        noise: Standard deviation of the noise added to a copy, as a fraction of the copied tensor's own.
        reinitialise: Fraction of a copy's FFN dimensions to reinitialize (Drop-Upcycling, arXiv 2502.19261): gate and
            up rows and down columns of the same random dimensions are sampled from a normal distribution with the mean
            and standard deviation of the entries they replace.
        seed: Random seed. Each tensor has its own random stream, which depends on no other tensor.
    """

    new_experts: Literal["copied", "random"] = "copied"
    noise: float = 0.0
    reinitialise: float = 0.0
    seed: int = 1234

    def check(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise UserError(f"--expert-noise must be at least 0 and finite, got {self.noise}")
        if not 0 <= self.reinitialise <= 1:
            raise UserError(f"--reinitialise must be between 0 and 1, got {self.reinitialise}")
        if self.new_experts == "random" and (self.noise or self.reinitialise):
            raise UserError("--new-experts random makes no copies; remove --expert-noise and --reinitialise")


def hf_to_mcore(
    hf_path: Path,
    save: Path,
    experts: NewExperts | None,
    start: Start | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    recorded: Model | None = None,
    extended_tokenizer: Path | None = None,
    verify: Verify = Verify.FULL,
) -> ModelSpec:
    """Convert a Hugging Face model to a Megatron checkpoint, upcycling its FFNs; an interrupted conversion resumes.

    Args:
        hf_path: Hugging Face directory of a dense model or a stock MoE.
        experts: Experts to add; None for a dense checkpoint.
        start: How new experts and routers start; None for the paper's method.
        dtype: Dtype of the checkpoint (float32, bfloat16, float16); None for the model's.
        recorded: Where the model at `hf_path` comes from, for the record; None for this folder.
        extended_tokenizer: Folder of a tokenizer that extends the model's: its new tokens get rows of the embedding and
            the output layer. None for the model's own tokenizer.

    Raises:
        UserError: the input is unsupported; `save` is then unchanged.
    """
    start = start or Start()
    start.check()
    sources = [hf_path] if extended_tokenizer is None else [hf_path, extended_tokenizer]
    check_output(save, sources, overwrite, SIGNS)
    family, base = read_base(hf_path)
    if experts is not None:
        spec = with_new_experts(family, base, experts)
    elif base.moe is None:
        spec = base
    else:
        raise UserError(f"{hf_path} is an MoE and cannot become a dense checkpoint; pass --num-new-experts")
    spec.check()
    source = HfReader(hf_path, verify=verify)
    names = check_weights(source, family, base)
    spec = _with_found_copies(source, family, base, spec)
    spec = replace(spec, dtype=dtype or common_dtype((source, name) for name in names))
    check_tokenizer(hf_path, spec.megatron_args["vocab_size"])
    extension = None
    if extended_tokenizer is not None:
        extension = read_extension(extended_tokenizer, hf_path)
        spec = spec.with_new_tokens(extension.first_new_id, extension.number)
        spec.check()

    plan = list(pieces(family.table, spec))
    num_bytes = getattr(torch, spec.dtype).itemsize * num_elements(plan)
    with output_folder(save, overwrite, num_bytes, sources, spec=asdict(spec), start=asdict(start)) as (folder, bar):
        copy_companions(hf_path, folder / HF_FOLDER, skip=TOKENIZER_FILES if extended_tokenizer else ())
        if extended_tokenizer is not None:
            copy_companions(extended_tokenizer, folder / HF_FOLDER, files=EXTENDED_FILES)
            config = read_config(hf_path) | {"vocab_size": spec.megatron_args["vocab_size"]}
            (folder / HF_FOLDER / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        record_dtype(folder / HF_FOLDER, ((source, name) for name in names))
        recorded = recorded or Model(hf_path, hf_path.resolve().name)
        Origin(recorded.name, asdict(start) if spec.moe else {}, revision=recorded.revision).write(folder)
        write_checkpoint(folder, plan, spec, lambda todo: _starting_tensors(source, todo, spec, start, extension), bar)
    return spec


def _with_found_copies(source: HfReader, family: Family, base: ModelSpec, spec: ModelSpec) -> ModelSpec:
    """The spec of an upcycled MoE with the copies that the base contains: the experts after 0 whose bits equal its own.

    At most K, and not all: an upcycled model without training, whose experts are all equal, is not a dense model.
    """
    if base.moe is None or spec.moe is None:
        return spec
    moe, places = spec.moe, base.moe.num_experts

    def with_copies(copies: int) -> ModelSpec:
        return replace(spec, moe=replace(moe, num_original_experts=places - copies + 1, original_copies=copies))

    def equals_expert_0(expert: int) -> bool:
        dense = [piece for piece in pieces(family.table, with_copies(expert + 1)) if piece.copies]
        names = ((a, b) for piece in dense for a, b in zip(piece.hf_names, piece.copies[-1], strict=True))
        return all(torch.equal(source.read(a).view(torch.uint8), source.read(b).view(torch.uint8)) for a, b in names)

    copies = 1
    while copies < min(moe.topk, places - 1) and equals_expert_0(copies):
        copies += 1
    return with_copies(copies)


# --- starting values


def _starting_tensors(
    source: HfReader, plan: list[Piece], spec: ModelSpec, start: Start, extension: VocabularyExtension | None
) -> Iterator[Tensor]:
    """The Megatron tensor of every piece in the spec's dtype; an FFN is read once for all its copies."""
    dtype = getattr(torch, spec.dtype)
    read_origin: tuple[str, ...] = ()
    tensor = torch.empty(0)
    for piece in plan:
        is_new = piece.part is Part.NEW_EXPERTS
        if piece.part is Part.ROUTER:
            yield cast(_router(source, piece, spec, start.seed), dtype, piece.key)
        elif is_new and start.new_experts == "random":
            fresh, std = torch.empty(megatron_shape(piece, spec)[1:]), spec.megatron_args["init_method_std"]
            yield fresh.normal_(std=std, generator=_stream(start.seed, piece)).to(dtype)
        else:
            if piece.origin != read_origin:
                del tensor  # one in memory
                parts = [_read(source, name) for name in piece.origin]
                if extension is not None and piece.part in VOCABULARY_PARTS:
                    parts = [with_new_rows(parts.pop(), extension, spec.megatron_args["vocab_size"], dtype)]
                tensor = cast(piece.transform.to_megatron(parts, sizes_of(spec)), dtype, piece.key)
                del parts
                read_origin = piece.origin
            yield _changed(tensor, piece, spec, start) if is_new else tensor


def _router(source: HfReader, piece: Piece, spec: ModelSpec, seed: int) -> Tensor:
    """Router rows [experts, hidden]: xavier-normal for a dense FFN, as any routing then computes the same.

    In an MoE, new experts start as copies of expert 0 and compete only with it: tokens whose top-k omits expert 0 are
    computed as before.
    """
    fresh = torch.nn.init.xavier_normal_(torch.empty(piece.hf_shapes[0]), generator=_stream(seed, piece))
    if not piece.origin:
        return fresh
    assert spec.moe is not None
    rows = _read(source, piece.origin[0]).float()
    # Expert 0's row plus a small random row, which decides which of the equal experts a token goes to.
    return torch.cat([rows, rows[:1] + 0.01 * fresh[spec.moe.num_original_places :]])


def _read(source: HfReader, name: str) -> Tensor:
    return check_finite(source.read(name), f"{source.folder}: {name}", "download the model again or use another one")


def _changed(tensor: Tensor, piece: Piece, spec: ModelSpec, start: Start) -> Tensor:
    if start.noise == 0 and start.reinitialise == 0:
        return tensor
    changed = tensor.to(torch.float32, copy=True)
    stream = _stream(start.seed, piece)
    if start.noise:
        deviation = start.noise * changed.std().item()
        for rows in changed.split(1024):  # bounds the memory of the noise
            rows.add_(torch.randn(rows.shape, generator=stream), alpha=deviation)
    if start.reinitialise:
        # Gate, up and down of one layer and expert share their dropped dimensions.
        layer, ffn = piece.key.partition(".mlp.")[0], spec.megatron_args["ffn_hidden_size"]
        order = torch.randperm(ffn, generator=_generator(f"{start.seed} {layer} {piece.expert} dropped"))
        dropped = order[: round(start.reinitialise * ffn)]
        parts = piece.transform.to_hf(changed, sizes_of(spec))
        # Gate and up, or down: views with one row per dimension.
        for matrix in parts if len(parts) == 2 else [parts[0].T]:
            entries = matrix[dropped]
            fresh = torch.randn(entries.shape, generator=stream)
            matrix[dropped] = entries.mean() + entries.std() * fresh
    return changed.to(tensor.dtype)


def _stream(seed: int, piece: Piece) -> torch.Generator:
    return _generator(f"{seed} {piece.key} {piece.expert or 0}")


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
