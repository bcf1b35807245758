"""The files of a model directory other than its weights: copied from another one, or written for an export."""

import json
from pathlib import Path
from typing import Any

from checkpoint_convert.hf.kept_tokenizer import keep_tokenizer
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE, COMPANION_FILES, COMPANION_FOLDERS
from moelpr.base.files import copy_part
from moelpr.model.families.hf_config import CONFIG_FILE


def copy_companions(
    source: Path, target: Path, skip: tuple[str, ...] = (), files: tuple[str, ...] = COMPANION_FILES
) -> None:
    """Copy config, tokenizer, chat template and model card, or those of them that `files` names, but no weights.

    Raises:
        UserError: one is a link out of the folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = [name for name in files if name not in skip and (source / name).is_file()]
    for name in (*names, *(name for name in COMPANION_FOLDERS if (source / name).is_dir())):
        copy_part(source, name, target / name)


def copy_card(source: Path, name: str, target: Path) -> None:
    """Copy a model card, if it is there."""
    if (source / name).is_file():
        copy_part(source, name, target)


def write_companions(folder: Path, base: Path, config: dict[str, Any], card: str) -> None:
    """Write everything of an export of the model in `base` except its weights."""
    copy_companions(base, folder, skip=(CONFIG_FILE, CARD_FILE))
    copy_card(base, CARD_FILE, folder / BASE_CARD_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    keep_tokenizer(base, folder)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
