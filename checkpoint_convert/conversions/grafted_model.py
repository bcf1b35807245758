"""Write a graft: a model with an instruct difference, the instruct model's tokenizer and settings, and the cards."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint_convert.card.front_matter import front_matter, inherited
from checkpoint_convert.card.graft_record import Graft, Only
from checkpoint_convert.card.model_card import LICENSE_KEYS, TEMPLATES, joint_license
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.conversions.instruct_difference import GraftReader
from checkpoint_convert.hf.chat_tokenizer import with_chat_settings, write_chat_tokenizer
from checkpoint_convert.hf.checks import check_same_tokenizer
from checkpoint_convert.hf.companions import copy_card, copy_companions
from checkpoint_convert.hf.hub import Model
from checkpoint_convert.hf.kept_tokenizer import keep_tokenizer
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE, DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.safetensors_writer import Tensors, write_weights
from moelpr.base.checksums import Verify
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.model.families.hub import is_hub_name

MODEL_CARD_FILE = "README-model.md"
INSTRUCT_CARD_FILE = "README-instruct.md"


def graft(
    base: Model,
    instruct: Model,
    model: Model,
    save: Path,
    scale: float = 1.0,
    only: Only = "all",
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> GraftReader:
    """Write the model with the difference as a Hugging Face directory; an interrupted call resumes.

    Args:
        base: The dense base; `instruct`: what post-training made of it; `model`: what it was upcycled to.
        dtype: Dtype of the output; None for the model's.

    Raises:
        UserError: the models do not fit each other; `save` is then unchanged.
    """
    record = Graft(base.name, instruct.name, model.name, scale, only)
    sources = base.folder, instruct.folder, model.folder
    check_output(save, list(sources), overwrite, (Graft.FILE_NAME,))
    reader = GraftReader(*sources, scale, only, dtype, verify)
    check_same_tokenizer(*sources, reader.shape("model.embed_tokens.weight")[0], reader.new_rows)
    config = with_chat_settings(read_config(model.folder), instruct.folder)
    config |= {"dtype": reader.dtype, "torch_dtype": reader.dtype}
    tensors = Tensors({name: reader.shape(name) for name in reader.names}, reader.read)
    target: torch.dtype = getattr(torch, reader.dtype)
    num_bytes = tensors.num_bytes(target)
    settings = {**asdict(record), "dtype": reader.dtype, "max_shard_bytes": max_shard_bytes}
    with output_folder(save, overwrite, num_bytes, list(sources), **settings) as (folder, journal, bar):
        copy_companions(instruct.folder, folder, skip=(CONFIG_FILE, CARD_FILE))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if reader.new_rows:
            write_chat_tokenizer(folder, instruct.folder, model.folder)
        else:
            keep_tokenizer(instruct.folder, folder)
        _write_cards(folder, record, instruct.folder, model.folder, len(reader.new_rows))
        record.write(folder)
        write_weights(journal, tensors, target, max_shard_bytes, bar)
    return reader


def _write_cards(folder: Path, record: Graft, instruct: Path, model: Path, num_new_tokens: int) -> None:
    """Write the graft's card, and next to it those that it links to."""
    cards = ((model, CARD_FILE, MODEL_CARD_FILE), (model, BASE_CARD_FILE, BASE_CARD_FILE))
    for source, name, kept in (*cards, (instruct, CARD_FILE, INSTRUCT_CARD_FILE)):
        copy_card(source, name, folder / kept)
    keys = ("language", "base_model", *LICENSE_KEYS)
    ours, theirs = inherited(model, keys), inherited(instruct, LICENSE_KEYS)
    made_of = [record.model, ours.get("base_model", record.base), record.instruct]
    parents = [name for name in made_of if isinstance(name, str) and is_hub_name(name)]
    metadata = front_matter(
        language=ours.get("language"),
        **joint_license(ours, theirs),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=parents or None,
        base_model_relation="merge" if parents else None,
        tags=["moe", "moe-lpr", "merge"],
    )
    card = TEMPLATES.get_template("graft_card.md").render(
        asdict(record),
        front_matter=metadata,
        num_new_tokens=num_new_tokens,
        has_model_card=(folder / MODEL_CARD_FILE).is_file(),
        has_instruct_card=(folder / INSTRUCT_CARD_FILE).is_file(),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
