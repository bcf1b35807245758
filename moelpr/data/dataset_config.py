"""Megatron's dataset configuration from the trainer's arguments."""

import argparse
import json
from pathlib import Path

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split

from moelpr.data.dataset import TokenIds
from moelpr.data.language_bits import LanguageBits, language_bits_path
from moelpr.errors import UserError
from moelpr.run_folder import HF_FOLDER


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is None and blend_per_split is None:
        raise UserError(
            "no training data; name corpora with --data-path PREFIX (built by data_tools/preprocess_data.py)"
        )
    if getattr(args, "lpr_loss_coeff", 0) > 0:
        _refuse_without_original_tokens(blend, blend_per_split)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=_token_ids(args),
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        reset_position_ids=False,
        reset_attention_mask=False,
        inter_document_masking=args.dataloader_inter_document_masking,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # attention is causal by itself
    )


def _refuse_without_original_tokens(blend: tuple | None, blend_per_split: list[tuple | None] | None) -> None:
    train = blend if blend is not None else (blend_per_split or [None])[0]
    prefixes = train[0] if train is not None else []
    missing = [prefix for prefix in prefixes if not language_bits_path(prefix).exists()]
    if missing:
        return  # the dataset says so itself
    if not any(LanguageBits(language_bits_path(prefix)).num_original for prefix in prefixes):
        raise UserError(
            f"the language-priors loss is on, but {', '.join(prefixes)} hold no original-language token; add text of "
            "the original languages (preprocess_data.py --language original), or pass --lpr-loss-coeff 0"
        )


def _token_ids(args: argparse.Namespace) -> TokenIds:
    """The model's vocabulary; the end-of-document id matters only to --eod-mask-loss."""
    eod = _eos_token_id(Path(args.model_source) / HF_FOLDER / "config.json")
    if args.eod_mask_loss and eod is None:
        raise UserError(
            "--eod-mask-loss needs to know where documents end, but the model's config.json says no eos_token_id; "
            "drop it"
        )
    return TokenIds(vocab_size=args.vocab_size, eod=-1 if eod is None else eod)


def _eos_token_id(config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    eos = json.loads(config_file.read_text()).get("eos_token_id")
    return eos[0] if isinstance(eos, list) else eos
