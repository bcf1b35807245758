"""Export a Megatron checkpoint as a stock Hugging Face model."""

from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint_convert.card.model_card import CardFacts, model_card
from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.hf.chat_tokenizer import check_chat_tokens, with_chat_settings, write_chat_tokenizer
from checkpoint_convert.hf.companions import copy_companions, write_companions
from checkpoint_convert.hf.model_files import DEFAULT_SHARD_BYTES
from checkpoint_convert.hf.multimodal import PROCESSOR_FILES, MultimodalBase
from checkpoint_convert.hf.safetensors_writer import Tensors, write_weights
from moelpr.base.checksums import FILE_NAME, Verify
from moelpr.base.errors import UserError
from moelpr.base.run_folder import HF_FOLDER
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.model.families.moe_classes import MOE_CLASSES, MoeClass
from moelpr.model.model_spec import ModelSpec


def mcore_to_hf(
    load: Path,
    save: Path,
    iteration: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    base_model: str | None = None,
    as_class: str | None = None,
    verify: Verify = Verify.FULL,
    chat_template_from: Path | None = None,
    multimodal_base: Path | None = None,
) -> CardFacts:
    """Export a checkpoint as a Hugging Face model, and return the facts of its model card; resumable.

    Args:
        iteration: Saved step to export; None for the latest.
        dtype: None for that of the model the checkpoint came from.
        base_model: Name of the base for the model card; None for the recorded one.
        as_class: Name of the MoE class to write, a key of MOE_CLASSES; None for the family's default.
        multimodal_base: Folder of the multimodal base whose other parts to take over; None for the language model only.
        chat_template_from: Folder of the chat model whose template, special tokens and generation settings to take.

    Raises:
        UserError: the input is invalid; `save` is then unchanged.
    """
    check_output(save, [load], overwrite, (CONFIG_FILE, FILE_NAME))
    source = MegatronReader(
        load, iteration, None if as_class is None else class_for(ModelSpec.read(load), as_class, load), verify
    )
    spec, dtype_name, hf = source.spec, dtype or source.spec.dtype, load / HF_FOLDER
    target: torch.dtype = getattr(torch, dtype_name)
    config = source.family.export_config(read_config(hf), spec, dtype_name)
    whole = None if multimodal_base is None else MultimodalBase.read(multimodal_base, spec, target, verify)
    config |= {} if whole is None else {"vision_config": whole.config["vision_config"]}
    lineage = Lineage.of(source.step_folder)
    facts = CardFacts(source, config, dtype_name, base_model or lineage.base_model, lineage)
    if chat_template_from is not None:
        check_chat_tokens(chat_template_from, hf)
        config = with_chat_settings(config, chat_template_from)
    tensors = Tensors({name: source.shape(name) for name in source.names}, source.read_finite)
    if whole is not None:
        tensors, config = whole.with_tensors(tensors), whole.with_text(config)
    settings = asdict(spec), dtype, max_shard_bytes, facts.architecture
    others = str(multimodal_base), str(chat_template_from)
    num_bytes, inputs = tensors.num_bytes(target), [source.step_folder]
    with output_folder(save, overwrite, num_bytes, inputs, settings=settings, others=others) as (folder, journal, bar):
        # Before the weights, so that an error does not follow hours of writing.
        if whole is not None:
            copy_companions(whole.folder, folder, files=PROCESSOR_FILES)
        write_companions(folder, hf, config, model_card(facts))
        if chat_template_from is not None:
            write_chat_tokenizer(folder, chat_template_from, folder)
            copy_companions(chat_template_from, folder, files=("generation_config.json",))
        write_weights(journal, tensors, target, max_shard_bytes, bar)
    return facts


def class_for(spec: ModelSpec, name: str, load: Path) -> MoeClass:
    """The class of this name; UserError if it cannot hold the model of `load` exactly."""
    moe_class = MOE_CLASSES[name]
    if spec.moe is None:
        raise UserError(f"--as chooses the class of an upcycled model, but {load} is dense; remove --as")
    if (misfit := moe_class.misfit(spec)) is not None:
        fitting = " or ".join(kind.name for kind in MOE_CLASSES.values() if kind.misfit(spec) is None)
        raise UserError(f"{load} cannot be written as {moe_class.architecture}: {misfit}; pass --as {fitting}")
    return moe_class
