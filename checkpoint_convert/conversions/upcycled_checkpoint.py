"""Convert a Hugging Face model to a Megatron checkpoint, dense or upcycled."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert.common.megatron_folder import SIGNS, num_elements, write_checkpoint
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.conversions.initialization import Start, starting_tensors
from checkpoint_convert.hf.checks import check_tokenizer, check_weights
from checkpoint_convert.hf.companions import copy_companions
from checkpoint_convert.hf.hub import Model
from checkpoint_convert.hf.kept_tokenizer import keep_tokenizer
from checkpoint_convert.hf.model_files import EXTENDED_FILES, TOKENIZER_FILES
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.vocabulary_rows import read_extension
from moelpr.base import records
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.run_folder import HF_FOLDER
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.families.families import read_base
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.families.tables import Piece, pieces
from moelpr.model.model_spec import ModelSpec


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
    ffns_of = Path(start.ffns_of or hf_path)
    sources = [hf_path, *({ffns_of} - {hf_path}), *([] if extended_tokenizer is None else [extended_tokenizer])]
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
    base_plan = list(pieces(family.table, base))
    names = check_weights(source, family, base, base_plan)
    ffns = source
    if ffns_of != hf_path:
        ffns = HfReader(ffns_of, verify=verify)
        check_weights(ffns, family, base, base_plan)
    spec = _with_found_copies(source, base_plan, base, spec)
    spec = replace(spec, dtype=dtype or common_dtype((source, name) for name in names))
    check_tokenizer(hf_path, spec.megatron_args["vocab_size"])
    extension = None
    if extended_tokenizer is not None:
        extension = read_extension(extended_tokenizer, hf_path)
        spec = spec.with_new_tokens(extension.first_new_id, extension.number)
        spec.check()

    plan = list(pieces(family.table, spec))
    num_bytes = getattr(torch, spec.dtype).itemsize * num_elements(plan)
    settings = {"spec": asdict(spec), "start": asdict(start), "chunks": "gate and up apart"}
    with output_folder(save, overwrite, num_bytes, sources, **settings) as (folder, journal, bar):
        copy_companions(hf_path, folder / HF_FOLDER, skip=TOKENIZER_FILES if extended_tokenizer else ())
        if extended_tokenizer is not None:
            copy_companions(extended_tokenizer, folder / HF_FOLDER, files=EXTENDED_FILES)
        # The language model's, if the base is multimodal.
        config = read_config(hf_path) | {"vocab_size": spec.megatron_args["vocab_size"]}
        config.pop("vision_config", None)
        if config != records.read(dict[str, Any], folder / HF_FOLDER / CONFIG_FILE, ""):
            (folder / HF_FOLDER / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
            if extended_tokenizer is None:
                keep_tokenizer(hf_path, folder / HF_FOLDER)
        recorded = recorded or Model(hf_path, hf_path.resolve().name)
        Lineage(recorded.name, asdict(start) if spec.moe else {}, revision=recorded.revision).write(folder / HF_FOLDER)
        write_checkpoint(
            journal, plan, spec, lambda todo: starting_tensors(source, ffns, todo, spec, start, extension), bar
        )
    return spec


def _with_found_copies(source: HfReader, base_plan: list[Piece], base: ModelSpec, spec: ModelSpec) -> ModelSpec:
    """The spec of an upcycled MoE with the copies that the base contains: the experts after 0 whose bits equal its own.

    At most K, and not all: an upcycled model without training, whose experts are all equal, is not a dense model.
    """
    if base.moe is None or spec.moe is None:
        return spec
    moe, places = spec.moe, base.moe.num_experts

    names_of: dict[int, list[str]] = {}  # the tensors of each expert, in the same order
    for piece in base_plan:
        if piece.expert is not None:
            for expert, names in enumerate(piece.places, start=piece.expert):
                names_of.setdefault(expert, []).extend(names)

    def equals_expert_0(expert: int) -> bool:
        names = zip(names_of[0], names_of[expert], strict=True)
        return all(torch.equal(source.read(a).view(torch.uint8), source.read(b).view(torch.uint8)) for a, b in names)

    copies = 1
    while copies < min(moe.topk, places - 1) and equals_expert_0(copies):
        copies += 1
    return replace(spec, moe=replace(moe, num_original_experts=places - copies + 1, original_copies=copies))
