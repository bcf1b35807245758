"""The tokenizer of a new model folder, which must give every text the IDs that the old folder's gives.

transformers chooses a tokenizer's class by the model_type of config.json, and some classes (Qwen2's, Llama's, GPT-2's)
replace the normalizer and the pre-tokenizer of tokenizer.json. So the same files can be another tokenizer next to the
config.json of an MoE.
"""

import json
from pathlib import Path
from typing import Any

from checkpoint_convert.hf.model_files import has_tokenizer
from moelpr.base import records
from moelpr.base.errors import UserError, reports_panics
from moelpr.data.tokenizers.loading import load_tokenizer, open_hf_tokenizer

# transformers 4 and 5 take the tokenizer.json of this class as it is, next to the config.json of every MoE class.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_CONFIG_FILE = "tokenizer_config.json"
_OTHER_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def keep_tokenizer(source: Path, folder: Path) -> None:
    """Rewrite the tokenizer in `folder`, whose files are copies of those in `source`, if it is another one there.

    tokenizer.json then has what transformers makes of the source's files, and other files with the vocabulary are gone.

    Args:
        source: Folder with a config.json and perhaps a tokenizer; `folder`: its copy with another config.json.

    Raises:
        UserError: no files make transformers load the same tokenizer.
    """
    if not has_tokenizer(source):
        return
    wanted = _facts(source)
    if not _is_same(folder, wanted):
        _rewrite(source, folder, wanted)
    sides = [open_hf_tokenizer(path).padding_side for path in (source, folder)]  # some classes have their own default
    if sides[0] != sides[1]:
        write_tokenizer_config(folder, read_tokenizer_config(folder) | {"padding_side": sides[0]})


def _rewrite(source: Path, folder: Path, wanted: tuple[object, ...]) -> None:
    content = load_tokenizer("HuggingFaceTokenizer", str(source)).source
    if isinstance(content, str):
        for name in _OTHER_VOCABULARIES:
            (folder / name).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        write_tokenizer_config(folder, _plain_config(source))
        if _is_same(folder, wanted):
            return
    raise UserError(
        f"transformers loads the tokenizer in {source} differently next to the export's config.json; save it again "
        "with AutoTokenizer and save_pretrained, and convert the model again"
    )


def _is_same(folder: Path, wanted: tuple[object, ...]) -> bool:
    try:
        return _facts(folder) == wanted
    except UserError:
        return False


def _facts(folder: Path) -> tuple[object, ...]:
    """The behavior that must not change: IDs of text, tokens around it, the end of a document, and decoding."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
    with reports_panics():
        ids = tokenizer.encode_whole(" a b")
    return tokenizer.fingerprint(), ids, tokenizer.eod_id, tokenizer.decode(ids)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; empty if there is none."""
    path = folder / _CONFIG_FILE
    return records.read(dict[str, Any], path, "download it again") if path.is_file() else {}


def write_tokenizer_config(folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer_config.json."""
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _plain_config(source: Path) -> dict[str, Any]:
    """The source's tokenizer_config.json for `_PLAIN_CLASS`, which knows no special tokens by itself."""
    config = read_tokenizer_config(source)
    for name, token in open_hf_tokenizer(source).special_tokens_map.items():
        recorded = config.get(name)
        if token != (recorded.get("content") if isinstance(recorded, dict) else recorded):
            config[name] = token
    return config | {"tokenizer_class": _PLAIN_CLASS}
