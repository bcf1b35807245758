"""Open a tokenizer on disk: as transformers has it, or as one of our own `Tokenizer`s.

Nothing is downloaded, and no code of a tokenizer's folder is run.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub.constants import HF_HUB_CACHE
from pydantic import Field, create_model

from moelpr.base import records
from moelpr.base.errors import UserError, first_line, reports_panics
from moelpr.base.records import FOREIGN
from moelpr.data.tokenizers.base import Tokenizer
from moelpr.data.tokenizers.libraries import HuggingFaceTokenizer, SentencePieceTokenizer

# Text that a tokenizer may lose parts of if it is loaded as one of another kind.
_PROBES = ("two words", "a\nb 12", "φως 光")
# Libraries count up to the largest ID. Published vocabularies have a million; a billion would take gigabytes.
_Vocabulary = dict[str, Annotated[int, Field(lt=10_000_000)]]
_REMEDY = "download the tokenizer again"
_MODEL = create_model("Model", __config__=FOREIGN, vocab=(_Vocabulary | list[Any], {}))  # a unigram model has a list
# The files of a tokenizer, as far as they are checked before a library opens them.
_FILES: dict[str, Any] = {
    "tokenizer_config.json": create_model("Config", __config__=FOREIGN, model_max_length=(int | float | None, None)),
    "tokenizer.json": create_model("Tokenizer", __config__=FOREIGN, model=(_MODEL, ...)),
    "vocab.json": _Vocabulary,
}


def load_tokenizer(tokenizer_type: str, tokenizer_model: str, must_keep_text: bool = False) -> Tokenizer:
    """Load a local tokenizer.

    Args:
        tokenizer_type: Megatron's name of the type.
        tokenizer_model: A folder (or the name of a cached model) or a SentencePiece .model file.
        must_keep_text: Whether to call `check_text_is_kept`.

    Raises:
        UserError: The tokenizer can't be loaded, or loses text.
    """
    if tokenizer_type == "SentencePieceTokenizer":
        try:
            return SentencePieceTokenizer(Path(tokenizer_model).read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"can't load a tokenizer from {tokenizer_model}; --tokenizer-model must be a SentencePiece .model file"
            ) from error
    tokenizer = open_hf_tokenizer(tokenizer_model)
    if must_keep_text:
        check_text_is_kept(tokenizer_model, tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {tokenizer_model} is a {type(tokenizer).__name__}, which the library tokenizers does "
            "not run; pass a folder with a tokenizer.json"
        )
    try:
        with reports_panics():
            return HuggingFaceTokenizer(
                tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.split_special_tokens
            )
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no other
        raise UserError(f"the tokenizer in {tokenizer_model} is damaged ({error}); {_REMEDY}") from error


_HAVE_VOCABULARY = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def open_hf_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Open the tokenizer in a folder, or of a cached model, with transformers."""
    for name, kind in _FILES.items():
        if (path := Path(source) / name).is_file():
            records.read(kind, path, _REMEDY)
    # transformers makes an empty tokenizer of the class that config.json implies.
    if Path(source).is_dir() and not any(path for name in _HAVE_VOCABULARY for path in Path(source).glob(name)):
        raise UserError(f"{source} has no tokenizer; copy that of the model there, at least tokenizer.json")
    if not Path(source).exists() and not Path(HF_HUB_CACHE, f"models--{str(source).replace('/', '--')}").exists():
        raise UserError(
            f"there is no tokenizer folder {source}, and the Hugging Face cache has no model of this name; hub names "
            "are not downloaded: run hf download NAME --local-dir DIR first"
        )
    from transformers import AutoTokenizer  # takes two seconds, which SentencePiece does not need

    try:
        with reports_panics():
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any exception
        raise UserError(
            f"the tokenizer in {source} cannot be opened ({first_line(error)}); it must be a folder with "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def check_text_is_kept(folder: str | os.PathLike[str], tokenizer: Any) -> None:
    """Check a Hugging Face tokenizer, as transformers has loaded it, against the tokenizer.json in its folder.

    transformers chooses the class by the model_type of config.json, and some classes replace the file's normalizer and
    pre-tokenizer. Over a vocabulary that writes a space as ▁, Qwen2's then drops every space.

    Raises:
        UserError: The file keeps text that the loaded tokenizer loses.
    """
    path = Path(folder) / "tokenizer.json"
    if not (tokenizer.is_fast and path.is_file()):
        return
    from tokenizers import Tokenizer as FileTokenizer

    in_file: Any = None
    for text in _PROBES:
        try:
            with reports_panics():
                ids = tokenizer.encode(text, add_special_tokens=False)
                if (decoded := tokenizer.decode(ids, clean_up_tokenization_spaces=False)) != text:
                    in_file = in_file or FileTokenizer.from_file(str(path))
                    kept = in_file.decode(in_file.encode(text, add_special_tokens=False).ids)
        except Exception:  # tokenizers raises no other, for a damaged file or text that a vocabulary cannot express
            continue
        if decoded != text and kept == text:
            raise UserError(
                f"transformers loads the tokenizer in {folder} as {type(tokenizer).__name__}, which loses text that "
                f"its tokenizer.json keeps ({text!r} becomes {decoded!r}); set tokenizer_class in "
                "tokenizer_config.json to PreTrainedTokenizerFast, or, if this is a Qwen2, for which transformers "
                "ignores it, use another model"
            )
