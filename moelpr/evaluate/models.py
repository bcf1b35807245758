"""Opening a model to evaluate: a Hugging Face directory or a Megatron checkpoint, behind one interface.

Hugging Face directories: stock classes, safetensors only, nothing fetched, no code of their own run.
"""

import gc
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelpr.errors import UserError
from moelpr.model_spec import FILE_NAME, ModelSpec


@dataclass(frozen=True)
class LoadedModel(ABC):
    """A causal language model in evaluation mode with its tokenizer."""

    directory: Path
    model: Any
    tokenizer: Any  # a transformers PreTrainedTokenizerBase
    start_id: int  # the token every document is conditioned on: BOS where the tokenizer has one, else EOS
    eos_id: int | None

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens, None where the model names no limit."""
        return read_max_positions(self.directory)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[batch, sequence, vocabulary] from a plain forward pass. Padding stands on the right."""

    @property
    @abstractmethod
    def routers(self) -> dict[int, nn.Module]:
        """Router of each MoE layer by decoder layer number, counted from 0; empty for a dense model."""

    @abstractmethod
    def router_logits(self, router: nn.Module, inputs: Any, output: Any) -> Tensor:
        """Logits [T, experts] of a router's call, from what a forward hook sees; T runs over batch, then sequence."""

    @property
    @abstractmethod
    def num_original_experts(self) -> int:
        """m; 1 for a dense model."""

    @property
    @abstractmethod
    def topk(self) -> int:
        """K; 1 for a dense model."""


@dataclass(frozen=True)
class HfModel(LoadedModel):
    """`model` is a transformers PreTrainedModel with a language-model head."""

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(self, tokens_BS: Tensor) -> Tensor:
        # No attention mask: padding is on the right, where a causal model's tokens never look.
        return self.model(input_ids=tokens_BS, use_cache=False).logits

    @property
    def routers(self) -> dict[int, nn.Module]:
        """Mixtral, Qwen2Moe and Qwen3Moe all name them `gate` and give them a weight [E, hidden]."""
        config = self.model.config
        num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        layers = getattr(self.model.get_decoder(), "layers", None)
        if not num_experts or layers is None:
            return {}
        return {
            number: module
            for number, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if name.rsplit(".", 1)[-1] == "gate" and module.weight.shape[0] == num_experts
        }

    def router_logits(self, router: nn.Module, inputs: Any, output: Any) -> Tensor:
        logits = output[0] if isinstance(output, tuple) else output  # (logits, top-k weights, top-k indices)
        return logits.flatten(0, -2)

    @property
    def num_original_experts(self) -> int:
        # Our exports say it in their config.json; the stock classes keep what they don't know.
        return getattr(self.model.config, "num_original_experts", 1)

    @property
    def topk(self) -> int:
        return getattr(self.model.config, "num_experts_per_tok", None) or 1


def is_megatron(directory: Path) -> bool:
    """Whether it is a checkpoint folder of the converter or the trainer, rather than a Hugging Face directory."""
    return (directory / FILE_NAME).is_file()


@contextmanager
def open_model(directory: Path, device: str = "auto", dtype: str = "auto") -> Iterator[LoadedModel]:
    """The model in `directory`, of either kind, in memory for as long as the `with` block runs. See `load_model`."""
    if is_megatron(directory):
        from moelpr.evaluate.megatron_model import open_megatron_model  # Megatron takes seconds to import

        with open_megatron_model(directory, device, dtype) as loaded:
            yield loaded
        del loaded
    else:
        yield load_model(directory, device, dtype)
    gc.collect()  # before the next one takes its memory


def load_model(directory: Path, device: str = "auto", dtype: str = "auto") -> HfModel:
    """Open a Hugging Face directory with transformers' own classes.

    device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...
    dtype: "auto" (float32 on a CPU, the checkpoint's own on a GPU), "float32", "bfloat16" or "float16".
    Raises UserError where the directory is no such model, is incomplete, or needs code of its own.
    """
    _check_directory(directory)
    torch_device = choose_device(device)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype == "auto":
        torch_dtype: Any = torch.float32 if torch_device.type == "cpu" else "auto"
    else:
        torch_dtype = getattr(torch, dtype)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is replaced by our sentence
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the empty shared expert, see below
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch_dtype, use_safetensors=True, output_loading_info=True,
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # transformers and safetensors each raise errors of their own
        raise UserError(f"{directory} cannot be opened as a causal language model: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    _refuse_missing_weights(directory, model, loading["missing_keys"])
    return HfModel(directory, model.to(torch_device).eval(), *load_tokenizer(directory))


def load_tokenizer(directory: Path) -> tuple[Any, int, int | None]:
    """The tokenizer in `directory`, the id a document starts with, and EOS. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {directory} cannot be opened: {_reason(error)}") from error
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError(
            f"the tokenizer in {directory} has neither a BOS nor an EOS token; a document needs one to start"
        )
    return tokenizer, start_id, tokenizer.eos_token_id


def read_max_positions(directory: Path) -> int | None:
    """Longest input in tokens of the model in `directory`, as its configuration says; None where it names no limit."""
    if is_megatron(directory):
        return ModelSpec.read(directory).megatron_args["max_position_embeddings"]
    _check_directory(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        limit = config.get("max_position_embeddings")
        return None if limit is None else int(limit)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}/config.json is no model configuration ({error})") from error


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(
            f"the model directory {directory} does not exist; give a Hugging Face directory or a Megatron checkpoint"
        )
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} holds neither config.json nor {FILE_NAME}, so it is no model; give a Hugging Face directory "
            "or a Megatron checkpoint folder"
        )
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds no *.safetensors weights; save the model with safe_serialization=True")


def choose_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one. Raises UserError for a device that is not there."""
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


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
