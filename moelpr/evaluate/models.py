"""Opening a Hugging Face model directory: stock classes, safetensors only, nothing fetched, no code of its own run."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moelpr.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode with its tokenizer."""

    directory: Path
    model: Any  # a transformers PreTrainedModel with a language-model head
    tokenizer: Any  # a transformers PreTrainedTokenizerBase
    start_id: int  # the token every document is conditioned on: BOS where the tokenizer has one, else EOS
    eos_id: int | None

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens, None where the model names no limit."""
        return read_max_positions(self.directory)

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_model(directory: Path, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Open `directory` with transformers' own classes.

    device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...
    dtype: "auto" (float32 on a CPU, the checkpoint's own on a GPU), "float32", "bfloat16" or "float16".
    Raises UserError where the directory is no such model, is incomplete, or needs code of its own.
    """
    _check_directory(directory)
    torch_device = _device(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype == "auto":
        torch_dtype: Any = torch.float32 if torch_device.type == "cpu" else "auto"
    else:
        torch_dtype = getattr(torch, dtype)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is replaced by our sentence
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **local)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the empty shared expert, see below
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **local
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each raise errors of their own
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{directory} cannot be opened as a causal language model: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    _refuse_missing_weights(directory, model, loading["missing_keys"])
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError(
            f"the tokenizer in {directory} has neither a BOS nor an EOS token; a document needs one to start"
        )
    return LoadedModel(directory, model.to(torch_device).eval(), tokenizer, start_id, tokenizer.eos_token_id)


def read_max_positions(directory: Path) -> int | None:
    """Longest input in tokens of the model in `directory` (from its config.json), None where it names no limit."""
    _check_directory(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        limit = config.get("max_position_embeddings")
        return None if limit is None else int(limit)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}/config.json is no model configuration ({error})") from error


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"the model directory {directory} does not exist; give a local Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is no Hugging Face model directory")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds no *.safetensors weights; save the model with safe_serialization=True")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}, but {torch.cuda.device_count()} GPUs are visible here; use --device cpu")
    return device


def _refuse_missing_weights(directory: Path, model: Any, missing: Any) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers and goes on: that is another model."""
    tensors = model.state_dict()
    # An upcycled Qwen2Moe has a shared expert of size 0, whose empty matrices are not in the file.
    missing = sorted(key for key in missing if key not in tensors or tensors[key].numel() > 0)
    if missing:
        raise UserError(
            f"the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them; export it again"
        )
