"""Packs: the FFNs of languages for one base, with the sums by which routers are found without anybody's text.

A model is a function of its base, its kept sums and a set of packs: the order in which they came does not matter, and
without one of them it is what it was before, bit for bit.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_convert.card.front_matter import front_matter
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.common.settings import MoeClassFlags, TextSettings
from checkpoint_convert.conversions.combined_model import (
    AdapterReader,
    Base,
    Expert,
    TopOne,
    combined_card,
    languages_by_name,
    open_expert,
    stock_moe,
    write_combined,
)
from checkpoint_convert.hf.model_files import CARD_FILE, DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.hf.safetensors_writer import Tensors, raw_bytes, write_weights
from moelpr.base import checksums
from moelpr.base.checksums import FileSum, Verify
from moelpr.base.errors import UserError, first_line
from moelpr.base.files import write_text
from moelpr.base.languages import language_name
from moelpr.base.records import STRICT, Record
from moelpr.measure.evaluate.calibration import Inputs, Rows, Sums, read_inputs, rows_of_sums
from moelpr.measure.evaluate.divergence import mean_loss
from moelpr.measure.evaluate.models import open_model
from moelpr.model.families.hub import is_hub_name
from moelpr.model.families.tables import stacked_part

# Shares of text to keep for each third of the layers: the first tell languages apart least, and harm least.
_SHARES = (0.9, 0.99, 0.99)
_SUMS_FILE = "sums.safetensors"
_DAMAGED = "download or copy the pack again"


@dataclass(frozen=True, config=STRICT)
class Pack(Record):
    """A pack of languages, or the sums of text to keep.

    Attributes:
        base: Name of the base on the Hub, or of its folder.
        base_sha256: Checksum of the names and values of the base's tensors.
        languages: Languages of the FFNs; empty for sums of text to keep.
        texts: Text → tokens that were held out.
        losses: Loss of the held-out text by the base and by the FFNs, in nats per token; null for text to keep.
        license: License of the pack, as the Hub names it.
        trained: How its FFNs were trained.
    """

    FILE_NAME: ClassVar[str] = "pack.json"
    REMEDY: ClassVar[str] = _DAMAGED
    MISSING: ClassVar[str] = "is not a pack: it has no pack.json; moelpr pack make or keep writes one"

    base: str
    base_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    languages: list[str]
    texts: dict[str, int]
    losses: tuple[float, float] | None = None
    license: str = ""
    trained: str = ""


@dataclass(frozen=True, config=STRICT)
class PackedModel(Record):
    """A model that was built of packs.

    Attributes:
        base: Name of the base's folder, and the checksum of its tensors.
        kept: Texts that the kept sums are of.
        packs: Pack → its languages, in the order of the new experts.
    """

    FILE_NAME: ClassVar[str] = "packs.json"

    base: tuple[str, str]
    kept: list[str]
    packs: dict[str, list[str]] = field(default_factory=dict)


def make_pack(
    base: Path,
    name: str,
    expert: Path | None,
    texts: Mapping[str, Sequence[str]],
    settings: TextSettings,
    license: str = "",
    trained: str = "",
) -> Pack:
    """Write the pack, for the base `name`, of an expert that knows the languages `texts`, or sums of text to keep."""
    sources = [base, *([expert] if expert else [])]
    check_output(settings.save, sources, settings.overwrite, (Pack.FILE_NAME,))
    dense = Base.open(base, settings.verify)
    experts = [open_expert(dense, expert, [*texts], ignore_others=False, verify=settings.verify)] if expert else []
    with open_model(base, settings.device, settings.dtype, settings.verify) as loaded:
        model = TopOne(loaded, dense, experts)
        reader = model.reader(len(experts), expert or base)
        inputs = read_inputs(reader, texts, settings.max_tokens, with_start=expert is None)
        pieces = [ids for its in inputs.pieces.values() for ids in its]
        losses = (mean_loss(model.reader(0, base).model, pieces), mean_loss(reader.model, pieces)) if expert else None
    num_tokens = {name: sum(map(len, its)) for name, its in inputs.pieces.items()}
    languages = [*texts] if expert else []
    record = Pack(name, _checksum(dense), languages, num_tokens, losses, license, trained)
    factors = [one.tensors for one in experts if isinstance(one.tensors, AdapterReader)]
    shapes = {name: dense.tensors.shape(name) for one in experts if not factors for name in dense.ffn}
    ffns = Tensors(shapes, experts[0].tensors.read if experts else dense.tensors.read)
    norms = [mean_H.norm().item() for mean_H in inputs.mean.values()]
    num_bytes = ffns.num_bytes(dense.dtype)
    with output_folder(settings.save, settings.overwrite, num_bytes, sources, rows=norms) as (folder, journal, bar):
        record.write(folder)
        save_file(_stored(inputs), folder / _SUMS_FILE)
        for adapter in factors:
            adapter.copy(folder)
        if shapes:
            write_weights(journal, ffns, dense.dtype, DEFAULT_SHARD_BYTES, bar)
        write_text(folder / CARD_FILE, _card(record))
        listed = (Pack.FILE_NAME, _SUMS_FILE, *AdapterReader.FILES)  # the card may be edited
        sums = {name: FileSum.of(folder / name) for name in listed if (folder / name).is_file()}
        checksums.write(folder, (checksums.read(folder) or {}) | sums)
    return record


def _card(pack: Pack) -> str:
    """README.md of a pack or of kept sums, which the Hub asks for."""
    title, packed, usage = "Text to keep", f"the sums of {', '.join(pack.texts)}", "PACK --kept THIS-FOLDER"
    if pack.losses:
        title, usage = ", ".join(map(language_name, pack.languages)), "THIS-FOLDER --kept KEPT"
        losses = "{:.3f} → {:.3f} nats per token".format(*pack.losses)
        packed = f"what its FFNs have learned (loss of held-out text: {losses}), and the sums"
    base_model = pack.base if is_hub_name(pack.base) else None
    tags = ["moe-lpr", "pack"]
    head = front_matter(language=pack.languages or None, base_model=base_model, license=pack.license or None, tags=tags)
    return (
        f"---\n{head}---\n\n# {title} for {pack.base}\n\n"
        f"A pack of moelpr for `{pack.base}` (SHA-256 {pack.base_sha256}): {packed} by which routers are found without "
        f"text. {pack.trained}\n\n```bash\nmoelpr pack build BASE {usage} --save MODEL\n```\n"
    )


def build_model(base: Path, kept: Path, packs: Sequence[Path], output: MoeClassFlags) -> PackedModel:
    """Write the stock MoE of a base and packs, without any text.

    Args:
        kept: The sums of text to keep.

    Raises:
        UserError: A pack is damaged, of another base, or there twice; `output.save` is then unchanged.
    """
    check_output(output.save, [base, kept, *packs], output.overwrite, (PackedModel.FILE_NAME,))
    dense = Base.open(base, output.verify)
    stock_moe(dense, len(packs), output.as_class)  # before it takes time
    checksum, records = _checksum(dense), {}
    for folder in (kept, *packs):
        record = records[folder] = read_pack(folder, output.verify)
        if record.base_sha256 != checksum:
            raise UserError(f"{folder} is of another base than {base}: its own is {record.base}, with other weights")
        if bool(record.languages) == (folder is kept):
            raise UserError(
                f"{folder} has FFNs; pass a folder of moelpr pack keep as --kept"
                if folder is kept
                else f"{folder} has sums of text to keep and no FFNs; pass it as --kept"
            )
    ordered = sorted(packs, key=lambda folder: records[folder].languages)
    languages = [language for folder in ordered for language in records[folder].languages]
    if twice := [language for language in languages if languages.count(language) > 1]:
        raise UserError(f"packs have {twice[0]} twice; pass one of them")
    if both := {*languages} & {*records[kept].texts}:
        raise UserError(f"{kept} has text to keep of {min(both)}, an expanded language; make it again without")
    experts = [Expert(folder, records[folder].languages, _ffns(dense, folder, output.verify)) for folder in ordered]
    num_layers, hidden = (dense.described.spec.megatron_args[name] for name in ("num_layers", "hidden_size"))
    rows: Rows = {}
    each = zip(*(read_sums(folder, num_layers, hidden) for folder in (kept, *ordered)), strict=True)
    for layer, (own, *others) in enumerate(each):  # one layer's sums are in memory at a time
        rows[layer] = rows_of_sums(own, others, _SHARES[layer * len(_SHARES) // num_layers])
    of_packs = languages_by_name(experts)
    model = PackedModel((records[kept].base, checksum), [*records[kept].texts], of_packs)
    routers = f"### Routers\n\nFound in closed form, by sums of {', '.join(model.kept)}. Nothing was measured.\n\n"
    write_combined(dense, experts, rows, combined_card(base, experts, of_packs, routers), model, output)
    return model


def read_pack(folder: Path, verify: Verify = Verify.FULL) -> Pack:
    """Read the record of a pack, or of kept sums; UserError if a file differs from its checksum."""
    if verify is not Verify.NONE:
        checksums.verify_folder(folder, _DAMAGED)
    return Pack.read(folder)


def _checksum(base: Base) -> str:
    """SHA-256 of the names and values of a base's tensors, however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted([*base.ffn, *base.others]):
        digest.update(f"{name}\0".encode())
        digest.update(raw_bytes(base.tensors.read(name)))
    return digest.hexdigest()


def _ffns(base: Base, folder: Path, verify: Verify) -> HfReader | AdapterReader:
    """The FFNs of a pack; UserError if they are not those of the base's shape."""
    if (folder / AdapterReader.FILES[0]).is_file():
        if outside := (adapter := AdapterReader(base.tensors, folder)).changed - {*base.ffn}:
            raise UserError(f"{folder} changes more than FFNs ({min(outside)}); {_DAMAGED}")
        return adapter
    reader = HfReader(folder, verify=verify)
    ours = {stacked_part(name)[0] for name in base.ffn}
    if wrong := sorted(ours ^ {*reader.names}) or [n for n in ours if reader.shape(n) != base.tensors.shape(n)]:
        raise UserError(f"{folder} does not have exactly the FFNs of the base ({wrong[0]}); {_DAMAGED}")
    return reader


def _stored(inputs: Inputs) -> dict[str, Tensor]:
    """Sums as they are stored: correlations of the lower triangle in 16 bits, and the diagonal in 32."""
    tensors = {}
    for layer, gram_HH in inputs.gram.items():
        diagonal_H = gram_HH.diagonal().float().cpu().clamp(min=1e-30)
        scaled_HH = gram_HH.float().cpu() / (diagonal_H.sqrt()[:, None] * diagonal_H.sqrt())
        lower = torch.tril_indices(len(scaled_HH), len(scaled_HH), offset=-1)
        tensors[f"{layer}.correlations"] = scaled_HH[*lower].half()
        tensors |= {f"{layer}.diagonal": diagonal_H, f"{layer}.mean": inputs.mean[layer].float().cpu()}
    return tensors


def read_sums(folder: Path, num_layers: int | None = None, hidden: int | None = None) -> Iterator[Sums]:
    """The sums of each layer, which must be those of a model of this size."""
    names, path = ("correlations", "diagonal", "mean"), folder / _SUMS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()) != len(names) * (num_layers := num_layers or len(file.keys()) // len(names)):
                raise ValueError(f"it does not have the sums of {num_layers} layers")
            for layer in range(num_layers):
                lower, diagonal_H, mean_H = (file.get_tensor(f"{layer}.{name}").float() for name in names)
                hidden = hidden or len(mean_H)
                if (len(lower), len(diagonal_H), len(mean_H)) != (hidden * (hidden - 1) // 2, hidden, hidden):
                    raise ValueError(f"layer {layer} has sums of another hidden size")
                is_possible = lower.abs().max() <= 1.01 and (mean_H**2 <= 2 * diagonal_H).all()
                if not (is_possible and diagonal_H.isfinite().all()):
                    raise ValueError(f"layer {layer} has sums of no text")
                scaled_HH = torch.eye(hidden)
                scaled_HH[*torch.tril_indices(hidden, hidden, offset=-1)] = lower
                scaled_HH = scaled_HH + scaled_HH.tril(-1).T
                yield scaled_HH * (diagonal_H.sqrt()[:, None] * diagonal_H.sqrt()), mean_H
    except Exception as error:  # safetensors raises errors of its own
        raise UserError(f"{path} cannot be read ({first_line(error)}); {_DAMAGED}") from error
