"""Adds an instruct difference to a model that was upcycled from the same base.

    θ = θ_M + s · (θ_I − θ_B)

for the model M, its dense base B, the instruct model I that someone made of B, and the scale s. Every expert gets the
difference of the FFN. Routers, which B and I lack, stay as they are.

Training left everything but routers and new experts as it is in B, so there θ = θ_I with s = 1: the path through the
original expert becomes the instruct model. Rows of new tokens, which B and I lack, also stay as they are.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_convert.card.card_metadata import CARD_FILE, read_card, split_card
from checkpoint_convert.card.companions import copy_companion, copy_companions
from checkpoint_convert.card.model_card import BASE_CARD_FILE, LICENSE_KEYS, TEMPLATES
from checkpoint_convert.compare.comparison import (
    CHUNK_ELEMENTS,
    TensorVerdict,
    compare_tensors,
    open_tensors,
    pieces_since,
)
from checkpoint_convert.conversions.export import DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.hf_folder import TOKENIZER_FILES, HfReader, check_tokenizer, common_dtype, write_weights
from checkpoint_convert.hf.hub import Model, is_hub_name
from checkpoint_convert.hf.kept_tokenizer import keep_tokenizer
from checkpoint_convert.hf.new_rows import grow, new_rows, shape_without
from checkpoint_convert.hf.outputs import cast, check_finite, check_output, output_folder
from checkpoint_convert.hf.weight_check import check_weights
from moelpr.data.tokenizer import load_tokenizer, open_hf_tokenizer
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.evaluate.models import is_megatron
from moelpr.families.families import CONFIG_FILE, read_base, read_config
from moelpr.families.tables import Piece
from moelpr.model_spec import ModelSpec
from moelpr.process.errors import UserError, first_line
from moelpr.stages import VOCABULARY_PARTS, Part
from moelpr.store import yaml_files
from moelpr.store.checksums import Verify
from moelpr.store.files import read_versioned
from moelpr.store.run_folder import read_json

RECORD_FILE = "graft.json"
FORMAT_VERSION = 1
MODEL_CARD_FILE = "README-model.md"
INSTRUCT_CARD_FILE = "README-instruct.md"

# The parts that get the difference; norms, embeddings and output layer only with "all".
PARTS = {
    "all": frozenset(Part),
    "attention": frozenset({Part.ATTENTION}),
    "ffn": frozenset({Part.DENSE_FFN, Part.ORIGINAL_EXPERTS, Part.NEW_EXPERTS}),
}

# Settings of a model that do not change what its weights compute.
_FREE_ARGS = ("max_position_embeddings", "attention_dropout", "init_method_std")

# Keys of config.json that readers use for chat and that come from the instruct model, as its tokenizer does.
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Graft:
    """The contents of graft.json: what was added to what.

    Attributes:
        base: Names of the models' folders, as are `instruct` and `model`.
        scale: s.
        only: Key of PARTS.
    """

    base: str
    instruct: str
    model: str
    scale: float = 1.0
    only: str = "all"

    def check(self) -> None:
        if not 0 < self.scale < 1e9:
            raise UserError(f"--scale must be above 0 and below 1e9, got {self.scale}")

    def write(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Graft":
        """Read graft.json; UserError if it is missing or damaged."""
        if not (folder / RECORD_FILE).is_file():
            raise UserError(f"{folder} is not a graft: it has no {RECORD_FILE}; graft.py writes one")

        def build(**fields: Any) -> Graft:
            graft = cls(**fields)
            graft.check()
            if graft.only not in PARTS:
                raise ValueError(f"only is {graft.only!r}")
            return graft

        return read_versioned(folder / RECORD_FILE, FORMAT_VERSION, build)


class GraftReader:
    """The model with the difference, tensor by tensor.

    Attributes:
        names: Names of the model's tensors, in its order.
        new_rows: Those of new tokens in embedding and output layer.

    Raises:
        UserError: the models do not fit each other; on access also, if a tensor that training leaves as it is differs
            from the base's, or the instruct model's has nothing in common with it.
    """

    def __init__(
        self,
        base: Path,
        instruct: Path,
        model: Path,
        scale: float = 1.0,
        only: str = "all",
        dtype: str | None = None,
        verify: Verify = Verify.FULL,
    ) -> None:
        self._base, base_spec = _open(base, verify)
        self._instruct, instruct_spec = _open(instruct, verify)
        self._model, spec = _open(model, verify)
        if spec.moe is None:
            raise UserError(f"{model} is dense; pass the export of a model that was upcycled from {base} as --model")
        for reader, dense in ((self._base, base_spec), (self._instruct, instruct_spec)):
            if dense.moe is not None:
                raise UserError(f"{reader.folder} is an MoE; pass the dense model that {model} was upcycled from")
        _, plan = pieces_since(base, model)
        self.new_rows = new_rows(base, model)
        self._model.list_parts(name for piece in plan for names in piece.places for name in names)
        self.names = self._model.names
        # Name in the model → name in base and instruct model, and the piece that it belongs to.
        self._sources: dict[str, tuple[str, Piece]] = {}
        for piece in plan:
            for names in piece.places if piece.origin else ():
                self._sources.update(zip(names, ((origin, piece) for origin in piece.origin), strict=True))
        self._check_shapes()
        _check_settings(self._base.folder, base_spec, instruct, instruct_spec)
        # The shapes show whether the vocabulary has grown by the new tokens.
        shape = spec.megatron_args | {"vocab_size": base_spec.megatron_args["vocab_size"]}
        _check_settings(self._base.folder, base_spec, model, replace(spec, megatron_args=shape))
        self._scale, self._parts = scale, PARTS[only]
        self.dtype = dtype or common_dtype((self._model, name) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor of the graft in its dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        tensor = _read(self._model, name)
        if name not in self._sources:
            return cast(tensor, dtype, name)
        origin, piece = self._sources[name]
        is_grafted = piece.part in self._parts
        if piece.is_trained and not is_grafted:
            return cast(tensor, dtype, name)
        base = self._read_dense(self._base, origin, tensor, piece)
        if not piece.is_trained and not torch.equal(base.to(tensor.dtype), tensor):
            for name_of_dtype in ("bfloat16", "float16"):
                if torch.equal(base.to(getattr(torch, name_of_dtype)).to(tensor.dtype), tensor):
                    raise UserError(
                        f"{self._model.folder} was trained in {name_of_dtype}, which rounded the base's weights, but "
                        f"is stored in another dtype; export it again with mcore_to_hf.py --dtype {name_of_dtype}"
                    )
            raise UserError(
                f"{self._base.folder} is not the base of {self._model.folder}: its {origin} differs from {name}, which "
                "training leaves as it is; pass the model that was upcycled (after --train-everything, there is none)"
            )
        if not is_grafted:
            return cast(tensor, dtype, name)
        instruct = self._read_dense(self._instruct, origin, tensor, piece)
        if not piece.is_trained and instruct.ndim == 2:
            self._check_related(origin, base, instruct)
        grafted = add_difference(tensor, base, instruct, self._scale, dtype)
        return check_finite(grafted, f"{name} with the difference", f"{self.dtype} is too narrow; pass another --dtype")

    def _rows(self, piece: Piece) -> range:
        """The rows of the piece that base and instruct model lack."""
        return self.new_rows if piece.part in VOCABULARY_PARTS else range(0)

    def _read_dense(self, reader: HfReader, name: str, model: Tensor, piece: Piece) -> Tensor:
        """A tensor of base or instruct model; rows of new tokens are the model's own, so that their difference is 0."""
        tensor, rows = _read(reader, name), self._rows(piece)
        return grow(tensor, model[rows.start : rows.stop], rows) if rows else tensor

    def _check_related(self, name: str, base: Tensor, instruct: Tensor) -> None:
        """Post-training moves a matrix by a small part of its norm; two unrelated ones are √2 norms apart."""
        if _norm(base, instruct) > _norm(base):
            raise UserError(
                f"{self._instruct.folder} was not made of {self._base.folder}: their {name} differ by more than the "
                "norm of the base's; pass the base's own instruct model"
            )

    def _check_shapes(self) -> None:
        base, instruct, model = self._base, self._instruct, self._model
        for name in base.names:
            if name not in instruct or instruct.shape(name) != base.shape(name):
                found = list(instruct.shape(name)) if name in instruct else "missing"
                raise UserError(
                    f"{name} has shape {list(base.shape(name))} in {base.folder}, but is {found} in {instruct.folder}; "
                    "pass the base's own instruct model, with the same vocabulary"
                )
        for name, (origin, piece) in self._sources.items():
            rows = self._rows(piece)
            if origin not in base or shape_without(base.shape(origin), rows) != shape_without(model.shape(name), rows):
                found = list(base.shape(origin)) if origin in base else "missing"
                raise UserError(
                    f"{name} has shape {list(model.shape(name))} in {model.folder}, but the {origin} that it comes "
                    f"from is {found} in {base.folder}; pass the model that was upcycled as --base"
                )


def add_difference(model: Tensor, base: Tensor, instruct: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """model + scale · (instruct − base) in `dtype`, computed in fp64.

    Even fp64 rounds the sum, so with scale 1 an element of the model that equals the base's (rounded to the model's
    dtype) becomes the instruct model's own.
    """
    result = torch.empty(model.shape, dtype=dtype)
    tensors = (result, model, base, instruct)
    for out, m, b, i in zip(*(tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in tensors), strict=True):
        total = m.double() + scale * (i.double() - b.double())
        out.copy_(torch.where(m == b.to(m.dtype), i.double(), total) if scale == 1 else total)
    return result


def graft(
    base: Model,
    instruct: Model,
    model: Model,
    save: Path,
    scale: float = 1.0,
    only: str = "all",
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> GraftReader:
    """Write the model with the difference as a Hugging Face directory; an interrupted call resumes.

    Args:
        base: The dense base; `instruct`: what post-training made of it; `model`: what it was upcycled to.
        scale: s.
        only: Key of PARTS.
        dtype: Dtype of the output; None for the model's.
        max_shard_bytes: Largest size of a safetensors file.

    Raises:
        UserError: the models do not fit each other; `save` is then unchanged.
    """
    record = Graft(base.name, instruct.name, model.name, scale, only)
    record.check()
    sources = base.folder, instruct.folder, model.folder
    check_output(save, list(sources), overwrite, (RECORD_FILE,))
    reader = GraftReader(*sources, scale, only, dtype, verify)
    _check_tokenizers(*sources, reader.shape("model.embed_tokens.weight")[0], reader.new_rows)
    config, instruct_config = read_config(model.folder), read_config(instruct.folder)
    config |= {key: instruct_config[key] for key in _TOKEN_KEYS if key in instruct_config}
    config |= {"dtype": reader.dtype, "torch_dtype": reader.dtype}
    config.pop("auto_map", None)  # older exports have their base's
    tensors = [(name, reader.shape(name)) for name in reader.names]
    target: torch.dtype = getattr(torch, reader.dtype)
    num_bytes = target.itemsize * sum(math.prod(shape) for _, shape in tensors)
    settings = {**asdict(record), "dtype": reader.dtype, "max_shard_bytes": max_shard_bytes}
    with output_folder(save, overwrite, num_bytes, list(sources), **settings) as (folder, bar):
        copy_companions(instruct.folder, folder, skip=(CONFIG_FILE, CARD_FILE))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if reader.new_rows:
            _write_extended_tokenizer(folder, instruct.folder, model.folder)
        else:
            keep_tokenizer(instruct.folder, folder)
        _write_cards(folder, record, instruct.folder, model.folder, len(reader.new_rows))
        record.write(folder)
        write_weights(folder, tensors, target, max_shard_bytes, reader.read, bar)
    return reader


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


def _write_cards(folder: Path, record: Graft, instruct: Path, model: Path, num_new_tokens: int) -> None:
    """Write the graft's card, and beside it those that it links to."""
    cards = ((model, CARD_FILE, MODEL_CARD_FILE), (model, BASE_CARD_FILE, BASE_CARD_FILE))
    for source, name, kept in (*cards, (instruct, CARD_FILE, INSTRUCT_CARD_FILE)):
        if (source / name).is_file():
            copy_companion(source, name, folder / kept)
    ours, theirs = (split_card(read_card(source) or "")[0] for source in (model, instruct))
    metadata = {key: ours[key] for key in ("language",) if key in ours} | _license(ours, theirs)
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    made_of = [record.model, ours.get("base_model", record.base), record.instruct]
    if parents := [name for name in made_of if isinstance(name, str) and is_hub_name(name)]:
        metadata |= {"base_model": parents, "base_model_relation": "merge"}
    metadata["tags"] = ["moe", "moe-lpr", "merge"]
    card = TEMPLATES.get_template("graft_card.md").render(
        asdict(record),
        front_matter=yaml_files.dump(metadata),
        num_new_tokens=num_new_tokens,
        has_model_card=(folder / MODEL_CARD_FILE).is_file(),
        has_instruct_card=(folder / INSTRUCT_CARD_FILE).is_file(),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _license(*cards: dict[str, Any]) -> dict[str, Any]:
    """The keys of the license that all cards have, or one that names each; {} if a card has none."""
    if not all("license" in card for card in cards):
        return {}
    found = [{key: card[key] for key in LICENSE_KEYS if key in card} for card in cards]
    if all(license == found[0] for license in found):
        return found[0]
    names = dict.fromkeys(str(license.get("license_name", license["license"])) for license in found)
    return {"license": "other", "license_name": "-and-".join(names)}


def _open(folder: Path, verify: Verify) -> tuple[HfReader, ModelSpec]:
    if is_megatron(folder):
        raise UserError(f"{folder} is a Megatron checkpoint; export it with mcore_to_hf.py and pass the export")
    family, spec = read_base(folder)
    reader = open_tensors(folder, verify=verify)
    assert isinstance(reader, HfReader)
    check_weights(reader, family, spec)
    return reader, spec


def _read(reader: HfReader, name: str) -> Tensor:
    return check_finite(reader.read(name), f"{reader.folder}: {name}", "download the model again or use another one")


def _norm(a: Tensor, b: Tensor | None = None) -> float:
    """Frobenius norm of a, or of a − b."""
    parts = [tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (a, b) if tensor is not None]
    chunks = (x.double() if not rest else x.double() - rest[0].double() for x, *rest in zip(*parts, strict=True))
    return sum(chunk.square().sum().item() for chunk in chunks) ** 0.5


def _check_settings(a: Path, a_spec: ModelSpec, b: Path, b_spec: ModelSpec) -> None:
    for key in sorted(a_spec.megatron_args.keys() | b_spec.megatron_args.keys()):
        found = [spec.megatron_args.get(key) for spec in (a_spec, b_spec)]
        if key not in _FREE_ARGS and found[0] != found[1]:
            raise UserError(
                f"{a} and {b} are different models: {key} is {found[0]} and {found[1]}; pass a base with the instruct "
                "model and the upcycled model that were made of it"
            )


def _write_extended_tokenizer(folder: Path, instruct: Path, model: Path) -> None:
    """The model's tokenizer with the instruct model's special tokens and chat template."""
    ours, theirs = map(open_hf_tokenizer, (model, instruct))
    for name, token in theirs.special_tokens_map.items():
        setattr(ours, name, token)
    ours.chat_template = theirs.chat_template
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    try:
        ours.save_pretrained(folder)
    except (ValueError, TypeError) as error:  # a template whose name is a path, or that is no text
        reason = first_line(error)
        raise UserError(f"the chat template of {instruct} can't be written ({reason}); download it again") from error
    _keep_tokenizer_class(folder / "tokenizer_config.json", model / "tokenizer_config.json")
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")  # so that not a token is written differently
    VocabularyExtension.read(model).write(folder)


def _keep_tokenizer_class(path: Path, of: Path) -> None:
    """transformers 5 writes a class that transformers 4 does not know."""
    config, before = (read_json(file) or {} for file in (path, of))
    if "tokenizer_class" in before:
        path.write_text(json.dumps(config | {"tokenizer_class": before["tokenizer_class"]}, indent=2) + "\n")


def _check_tokenizers(base: Path, instruct: Path, model: Path, vocab_size: int, new: range) -> None:
    """UserError unless all three give every text the same IDs, or the model's extends the others' by the IDs `new`."""
    tokenizers = []
    for folder in (base, instruct, model):
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{folder} contains no tokenizer; copy the one that the model was trained with there")
        check_tokenizer(folder, vocab_size)
        tokenizers.append(load_tokenizer("HuggingFaceTokenizer", str(folder)))
    for folder, tokenizer in zip((instruct, model), tokenizers[1:], strict=True):
        if tokenizer.fingerprint() == tokenizers[0].fingerprint():
            continue
        ours, theirs = ({id: token for token, id in t.vocabulary().items()} for t in (tokenizers[0], tokenizer))
        if folder == model and ours == {id: token for id, token in theirs.items() if id not in new}:
            continue
        different = [id for id in sorted(ours.keys() | theirs.keys()) if ours.get(id) != theirs.get(id)]
        reason = "they split text differently"
        if different:
            tokens = [by_id.get(different[0]) for by_id in (ours, theirs)]
            reason = f"the token {different[0]} is {tokens[0]!r} and {tokens[1]!r}"
        raise UserError(
            f"the tokenizers of {base} and {folder} differ: {reason}; pass models with the same tokenizer, as new text "
            "would otherwise get other tokens than in training"
        )
