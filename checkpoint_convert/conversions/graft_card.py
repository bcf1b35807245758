"""The model card of a graft."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_convert.card.front_matter import front_matter, inherited
from checkpoint_convert.card.model_card import LICENSE_KEYS, TEMPLATES
from checkpoint_convert.conversions.graft_record import Graft
from checkpoint_convert.hf.companions import copy_companion
from checkpoint_convert.hf.hub import is_hub_name
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE

MODEL_CARD_FILE = "README-model.md"
INSTRUCT_CARD_FILE = "README-instruct.md"


def write_cards(folder: Path, record: Graft, instruct: Path, model: Path, num_new_tokens: int) -> None:
    """Write the graft's card, and next to it those that it links to."""
    cards = ((model, CARD_FILE, MODEL_CARD_FILE), (model, BASE_CARD_FILE, BASE_CARD_FILE))
    for source, name, kept in (*cards, (instruct, CARD_FILE, INSTRUCT_CARD_FILE)):
        if (source / name).is_file():
            copy_companion(source, name, folder / kept)
    keys = ("language", "base_model", *LICENSE_KEYS)
    ours, theirs = inherited(model, keys), inherited(instruct, LICENSE_KEYS)
    made_of = [record.model, ours.get("base_model", record.base), record.instruct]
    parents = [name for name in made_of if isinstance(name, str) and is_hub_name(name)]
    metadata = front_matter(
        language=ours.get("language"),
        **_license(ours, theirs),
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


def _license(*cards: dict[str, Any]) -> dict[str, Any]:
    """The keys of the license that all cards have, or one that names each; {} if a card has none."""
    if not all("license" in card for card in cards):
        return {}
    found = [{key: card[key] for key in LICENSE_KEYS if key in card} for card in cards]
    if all(license == found[0] for license in found):
        return found[0]
    names = dict.fromkeys(str(license.get("license_name", license["license"])) for license in found)
    return {"license": "other", "license_name": "-and-".join(names)}
