"""The names of the files in a Hugging Face model directory."""

from pathlib import Path

from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE
from moelpr.model.families.hf_config import CONFIG_FILE

# Weight files are STEM.safetensors, or STEM-00001-of-00002.safetensors, … with STEM.safetensors.index.json.
MODEL_STEM = "model"

# The files of a model other than its weights. No code (*.py): nothing here needs trust_remote_code.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Files that replace the model's own if its tokenizer is extended.
EXTENDED_FILES = (*TOKENIZER_FILES, VOCABULARY_EXTENSION_FILE, "chat_template.jinja", "chat_template.json")
COMPANION_FILES = (CONFIG_FILE, "generation_config.json", *EXTENDED_FILES, "README.md", "LICENSE", "NOTICE")
COMPANION_FOLDERS = ("additional_chat_templates",)
CARD_FILE = "README.md"
# An export contains the card of the base model under this name.
BASE_CARD_FILE = "README-base.md"

DEFAULT_SHARD_BYTES = 5 * 10**9


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
