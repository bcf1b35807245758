"""Write an export again with calibrated routers: rows of the original expert's copies that text to keep chooses."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.hf.companions import copy_companion, copy_companions
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE, DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.safetensors_writer import Tensors, write_weights
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.records import STRICT, Record
from moelpr.measure.evaluate.calibration import Calibration, Shares, calibrations, read_inputs
from moelpr.measure.evaluate.divergence import distance, mean_loss, predictions
from moelpr.measure.evaluate.models import LoadedModel, open_model, require_hf
from moelpr.model.families.families import COPIES_KEY
from moelpr.model.families.hf_config import read_config

# The names of a router's weight in the files of all stock classes.
_ROUTER = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router\.layer)\.weight")


@dataclass(frozen=True, config=STRICT)
class CalibratedRouters(Record):
    """How the routers of an export were calibrated.

    Attributes:
        model: Name of the folder of the export.
        texts: Names of the texts to keep and of the expanded languages.
        keep_original: Fraction of the tokens of text to keep all of whose choices should be original.
        before: Text, kept or expanded → where its held-out tokens went.
        after: The same with calibrated routers.
        distance: KL(base‖model) on held-out text to keep, in nats per token, before and after.
        loss: The loss of held-out expanded text in nats per token, before and after.
        tried: Distance and loss of each calibration that was tried.
        max_distance: The most distance that was allowed; null if the sum of distance and loss decided.
    """

    FILE_NAME: ClassVar[str] = "calibration.json"
    REMEDY: ClassVar[str] = "calibrate the export again with moelpr model calibrate"

    model: str
    texts: dict[str, list[str]]
    keep_original: float
    before: dict[str, Shares]
    after: dict[str, Shares]
    distance: tuple[float, float]
    loss: tuple[float, float]
    tried: list[tuple[float, float]] = field(default_factory=list)
    max_distance: float | None = None


def write_calibrated(
    model: Path,
    base: Path,
    save: Path,
    kept: Mapping[str, Sequence[str]],
    expanded: Mapping[str, Sequence[str]],
    share: float,
    max_tokens: int,
    max_distance: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> CalibratedRouters:
    """Calibrate the routers of `model` and write it to `save`; only their weights change.

    Args:
        model: Export of a model with as many copies of the original expert as choices.
        base: The dense base that it was upcycled from.
        kept: Name → documents whose tokens should go to the original expert.
        expanded: Language → documents whose tokens should go where they go now.
        share: Fraction of the tokens of `kept` all of whose choices should be original.
        max_tokens: Tokens of each text that are used.
        max_distance: The most KL(base‖model) on held-out text to keep, in nats per token, at which the loss of expanded
            text is to be smallest; None: the sum of both is.

    Raises:
        UserError: The models do not fit each other or the method; `save` is then unchanged.
    """
    require_hf({"model": model, "base": base}, "moelpr model calibrate")
    check_output(save, [model, base], overwrite, (CalibratedRouters.FILE_NAME,))
    num_layers, hidden = _sizes(model)
    with open_model(base, device, dtype, verify) as loaded:
        of_kept = read_inputs(loaded, _ffns(loaded, num_layers, hidden), kept, max_tokens, with_start=True)
        of_base = predictions(loaded, of_kept.pieces)
    with open_model(model, device, dtype, verify) as loaded:
        places, topk = loaded.num_original_places, loaded.topk
        of_expanded = read_inputs(loaded, loaded.routers, expanded, max_tokens, with_start=False)
        routers: dict[int, Any] = {layer: router.weight for layer, router in loaded.routers.items()}
        trained = {layer: weight.detach().clone() for layer, weight in routers.items()}

        def measured(rows: Mapping[int, Tensor]) -> tuple[float, float]:
            for layer, row_H in rows.items():
                routers[layer].data[:places] = row_H.to(routers[layer])
            return distance(loaded, of_kept.pieces, of_base), mean_loss(loaded, of_expanded.pieces)

        before = measured({})
        tried = [(measured(one.rows), one) for one in calibrations(trained, places, topk, of_kept, of_expanded, share)]
    after, best = _chosen(tried, before, max_distance)
    texts = {"kept": list(kept), "expanded": list(expanded)}
    distances, losses = zip(before, after, strict=True)
    record = CalibratedRouters(
        model.resolve().name,
        texts,
        share,
        best.before,
        best.after,
        distances,
        losses,
        tried=[pair for pair, _ in tried],
        max_distance=max_distance,
    )
    _write(model, save, best.rows, places, record, overwrite, verify)
    return record


def _chosen(
    tried: Sequence[tuple[tuple[float, float], Calibration]], before: tuple[float, float], max_distance: float | None
) -> tuple[tuple[float, float], Calibration]:
    """The best calibration, with its distance and loss.

    Raises:
        UserError: None is better than no calibration, or all are further from the base than `max_distance`.
    """
    if max_distance is None:
        after, best = min(tried, key=lambda pair: sum(pair[0]))
        is_better = sum(after) < sum(before)
    else:
        within = [pair for pair in tried if pair[0][0] <= max_distance]
        if not within:
            raise UserError(
                f"calibrated routers would be at least {min(pair[0][0] for pair in tried):.3f} nats per token from the "
                f"base, more than --max-distance {max_distance:g}; pass a larger one, or more text to keep"
            )
        after, best = min(within, key=lambda pair: pair[0][1])
        is_better = any(new < old for new, old in zip(after, before, strict=True))
    if not is_better:
        raise UserError(
            "calibrated routers would be no better than trained ones: KL(base‖model) on held-out text to keep would be "
            f"{after[0]:.3f} nats per token, now {before[0]:.3f}, and the loss of expanded text "
            f"{after[1]:.3f}, now {before[1]:.3f}; keep the export as it is (in languages.yaml, remove "
            "languages.kept and any replay: none), or pass more text"
        )
    return after, best


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


def _ffns(base: LoadedModel, num_layers: int, hidden: int) -> dict[int, nn.Module]:
    """The FFNs of the base's layers, which read what the routers of the upcycled model read."""
    layers = list(getattr(base.model.get_decoder(), "layers", []))
    if base.routers or len(layers) != num_layers or base.model.config.get_text_config().hidden_size != hidden:
        raise UserError(
            f"--base {base.directory} is not the dense model that --model was upcycled from: it must have "
            f"{num_layers} layers without experts and a hidden size of {hidden}"
        )
    return {number: getattr(layer, "mlp", None) or layer.shared_mlp for number, layer in enumerate(layers)}


def _card(card: str, record: CalibratedRouters) -> str:
    """The card of the export, with what was calibrated before the section on its use."""
    before, after = (f"{shares['kept'].all_original:.1%}" for shares in (record.before, record.after))
    text = (
        "### Calibrated routers\n\n"
        "The original expert's rows of each router are one direction, which was found without training. "
        f"Of held-out tokens of text to keep ({', '.join(record.texts['kept'])}), {after} now choose original experts "
        f"only, instead of {before} (mean over layers).\n\n"
    )
    head, use, rest = card.partition("## Use\n")
    return head + (text if use else f"\n{text}") + use + rest


def _write(
    model: Path,
    save: Path,
    row_of: Mapping[int, Tensor],
    places: int,
    record: CalibratedRouters,
    overwrite: bool,
    verify: Verify,
) -> None:
    source, other_parts = HfReader(model, verify=verify), HfReader(model, verify=verify, text=False)
    readers = {name: reader for reader in (source, other_parts) for name in reader.names}
    dtype: torch.dtype = getattr(torch, common_dtype((reader, name) for name, reader in readers.items()))
    rows = {name: row_of[int(match[1])] for name in readers if (match := _ROUTER.fullmatch(name))}
    assert len(rows) == len(row_of), "every router has a name that is known"

    def read(name: str) -> Tensor:
        tensor = readers[name].read(name)
        if name in rows:
            tensor = tensor.float()
            tensor[:places] = rows[name]
        return tensor

    tensors = Tensors({name: reader.shape(name) for name, reader in readers.items()}, read)
    norms = {name: row_H.norm().item() for name, row_H in rows.items()}  # other text has other norms
    with output_folder(save, overwrite, tensors.num_bytes(dtype), [model], rows=norms) as (folder, journal, bar):
        copy_companions(model, folder, skip=(CARD_FILE,))
        for name in (CARD_FILE, BASE_CARD_FILE):
            if (model / name).is_file():
                copy_companion(model, name, folder / name)
        if (folder / CARD_FILE).is_file():
            card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
            write_text(folder / CARD_FILE, _card(card, record))
        record.write(folder)
        write_weights(journal, tensors, dtype, DEFAULT_SHARD_BYTES, bar)
