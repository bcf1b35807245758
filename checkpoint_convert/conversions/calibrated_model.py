"""Write an export again with routers in closed form; nothing else changes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.common.settings import RoutingSettings
from checkpoint_convert.conversions.routed_model import RoutedModel, ffns_of
from checkpoint_convert.hf.companions import copy_card, copy_companions
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE, DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.safetensors_writer import Tensors, write_weights
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.measure.evaluate.calibration import Reader, Rows, Subject, calibrate
from moelpr.measure.evaluate.models import open_model
from moelpr.model.families.families import COPIES_KEY
from moelpr.model.families.hf_config import read_config

# The names of a router's weight in the files of all stock classes.
_ROUTER = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router\.layer)\.weight")


def write_calibrated(
    model: Path,
    base: Path,
    kept: Mapping[str, Sequence[str]],
    expanded: Mapping[str, Sequence[str]],
    settings: RoutingSettings,
) -> RoutedModel:
    """Find routers for `model` and write it to `settings.save`; only their weights change.

    Args:
        model: Export of a model with as many copies of the original expert as choices.
        base: The dense base that it was upcycled from.
        kept: Name → documents whose tokens should stay with the base.
        expanded: Language → documents whose tokens should go to what was learned.

    Raises:
        UserError: The models do not fit each other or the method; `settings.save` is then unchanged.
    """
    check_output(settings.save, [model, base], settings.overwrite, (RoutedModel.FILE_NAME,))
    num_layers, hidden = _sizes(model)
    with open_model(base, settings.device, settings.dtype, settings.verify) as dense:
        reader = Reader(dense, ffns_of(dense, "--base", num_layers, hidden))
        with open_model(model, settings.device, settings.dtype, settings.verify) as loaded:
            places = loaded.num_original_places
            routers: dict[int, Any] = {layer: router.weight for layer, router in loaded.routers.items()}

            def put(rows: Rows) -> None:
                for layer, rows_EH in rows.items():
                    routers[layer].data.copy_(rows_EH)

            routed = Reader(loaded, loaded.routers)
            new_rows = {layer: weight.detach()[places:].float().cpu() for layer, weight in routers.items()}
            subject = Subject(reader, routed, [(routed, [*expanded])], put, places, new_rows)
            routers_of, findings, _ = calibrate(subject, kept, expanded, settings)
    record = RoutedModel(model.resolve().name, {}, findings)
    _write(model, {layer: rows_EH[:places] for layer, rows_EH in routers_of.items()}, record, settings)
    return record


def _sizes(model: Path) -> tuple[int, int]:
    """The number of layers and the hidden size of an export, whose tokens can choose original experts only.

    Raises:
        UserError: They cannot, or its config.json lacks something.
    """
    config = read_config(model)
    config = config.get("text_config", config)
    topk = config.get("num_experts_per_tok") or config.get("moe_k")
    if not topk:
        raise UserError(f"{model} is dense and has no routers; pass an export of an upcycled model")
    if (places := config.get("num_original_experts", 1)) < topk:
        raise UserError(
            f"a token of {model} chooses {topk} experts and only {places} of them can be the original one, so a new "
            f"expert always has a part; upcycle with --original-copies {topk}"
        )
    if earlier := places - config.get(COPIES_KEY, 1):
        raise UserError(
            f"{model} has the experts of earlier rounds ({earlier} of {places} original ones), and calibration keeps "
            "one dense base; calibrate the export of a model with one round"
        )
    try:
        return config["num_hidden_layers"], config["hidden_size"]
    except KeyError as error:
        raise UserError(f"{model}/config.json lacks {error}; pass an export of an upcycled model") from error


def _write(model: Path, row_of: Mapping[int, Tensor], record: RoutedModel, settings: RoutingSettings) -> None:
    source, other_parts = (HfReader(model, verify=settings.verify, text=text) for text in (True, False))
    readers = {name: reader for reader in (source, other_parts) for name in reader.names}
    dtype: torch.dtype = getattr(torch, common_dtype((reader, name) for name, reader in readers.items()))
    rows = {name: row_of[int(match[1])] for name in readers if (match := _ROUTER.fullmatch(name))}
    assert len(rows) == len(row_of), "every router has a name that is known"

    def read(name: str) -> Tensor:
        tensor = readers[name].read(name)
        if name in rows:
            tensor = tensor.float()
            tensor[: len(rows[name])] = rows[name]
        return tensor

    tensors = Tensors({name: reader.shape(name) for name, reader in readers.items()}, read)
    norms = {name: its.norm().item() for name, its in rows.items()}  # other text has other norms
    num_bytes, save = tensors.num_bytes(dtype), settings.save
    with output_folder(save, settings.overwrite, num_bytes, [model], rows=norms) as (folder, journal, bar):
        copy_companions(model, folder, skip=(CARD_FILE,))
        for name in (CARD_FILE, BASE_CARD_FILE):
            copy_card(model, name, folder / name)
        if (folder / CARD_FILE).is_file():
            card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
            head, use, rest = card.partition("## Use\n")  # routers come before it
            routers = record.card_text() if use else f"\n{record.card_text()}"
            write_text(folder / CARD_FILE, head + routers + use + rest)
        record.write(folder)
        write_weights(journal, tensors, dtype, DEFAULT_SHARD_BYTES, bar)
