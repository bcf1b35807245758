"""The front matter of model cards (README.md), which huggingface_hub parses and writes."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError

from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.base.errors import UserError, first_line
from moelpr.base.secrets import without_paths

_NORWEGIAN = "no"  # YAML 1.1 reads it as false unless it is quoted


# A language, a licence's name, or where it is: a file or a page.
_SAFE = re.compile(r"https?://[^\s<>\"']+|[\w./ +()-]*")


def read_card(folder: Path) -> ModelCard | None:
    """The card of a model; None if it has none.

    Raises:
        UserError: The Hub could not read its front matter either.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        # The library warns about a card without front matter.
        card = ModelCard(text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}")
    except (YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"the front matter of {path} is not that of a model card ({reason}); fix it") from error
    languages = card.data.get("language")
    if isinstance(languages, list):
        card.data["language"] = [_NORWEGIAN if language is False else language for language in languages]
    elif languages is False:
        card.data["language"] = _NORWEGIAN
    return card


def inherited(folder: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the texts under `keys` in the card of a folder; {} if its front matter can't be read."""
    try:
        card = read_card(folder)
    except UserError:
        return {}
    found = {} if card is None else {key: card.data[key] for key in keys if texts(card.data.get(key))}
    return {key: value for key, value in found.items() if all(map(_SAFE.fullmatch, texts(value)))}


def plain(value: Any) -> Any:
    """A value from a record that may come from elsewhere: texts of one line, without markup and paths of a machine."""
    if isinstance(value, str):
        return " ".join(re.sub(r"[<>|`\[\]\\]", " ", without_paths(value)).split())
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def texts(value: Any) -> list[str]:
    """The texts of a field, which may be one text or a list of them; [] if it is something else."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(item, str) for item in values) else []


def front_matter(**fields: Any) -> str:
    """YAML of the fields in their order, without those that are None."""
    return ModelCardData(**fields).to_yaml(original_order=list(fields)) + "\n"
