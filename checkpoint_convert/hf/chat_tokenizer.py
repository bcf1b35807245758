"""The tokenizer of a model that chats: the model's own tokens with the special tokens and the template of another."""

from pathlib import Path
from typing import Any

from checkpoint_convert.hf.kept_tokenizer import read_tokenizer_config, write_tokenizer_config
from checkpoint_convert.hf.model_files import TOKENIZER_FILES
from moelpr.base.errors import UserError, first_line
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE
from moelpr.model.families.hf_config import read_config

# Keys of config.json that readers use for chat and that come from the instruct model, as its tokenizer does.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_chat_tokenizer(folder: Path, instruct: Path, model: Path) -> None:
    """Write into `folder` the tokenizer of `model` with the special tokens and the chat template of `instruct`.

    `folder` may be that of `model`.
    """
    before = read_tokenizer_config(model)
    names = "tokenizer.json", VOCABULARY_EXTENSION_FILE  # kept, so that not a token is written differently
    kept = {name: (model / name).read_bytes() for name in names if (model / name).is_file()}
    ours, theirs = map(open_hf_tokenizer, (model, instruct))
    for name, token in theirs.special_tokens_map.items():
        setattr(ours, name, token)
    ours.chat_template = theirs.chat_template
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    try:
        ours.save_pretrained(folder)
    except (ValueError, TypeError) as error:  # a template whose name is a path, or that is no text
        reason = first_line(error)
        raise UserError(f"the chat template of {instruct} can't be written ({reason}); download it again") from error
    if "tokenizer_class" in before:  # transformers 5 writes a class that transformers 4 does not know
        config = read_tokenizer_config(folder) | {"tokenizer_class": before["tokenizer_class"]}
        write_tokenizer_config(folder, config)
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def check_chat_tokens(instruct: Path, model: Path) -> None:
    """Raise `UserError` unless `instruct` has a chat template, whose tokens are the same tokens in `model`."""
    ours, theirs = map(open_hf_tokenizer, (model, instruct))
    if not theirs.chat_template:
        raise UserError(f"--chat-template-from {instruct} has no chat template; pass the folder of a chat model")
    vocabulary = ours.get_vocab()
    for id, token in theirs.added_tokens_decoder.items():
        if token.content in str(theirs.chat_template) and vocabulary.get(token.content) != id:
            raise UserError(
                f"the chat template of {instruct} contains {token.content}, which is not the same token in {model}; "
                "pass a model with this tokenizer"
            )


def with_chat_settings(config: dict[str, Any], instruct: Path) -> dict[str, Any]:
    """The config.json `config` with the instruct model's special tokens."""
    theirs = read_config(instruct)
    return config | {key: theirs[key] for key in TOKEN_KEYS if key in theirs}
