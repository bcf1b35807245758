"""A Megatron checkpoint as a model to evaluate: the trainer's own code, in this one process."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelpr.errors import UserError
from moelpr.evaluate.models import LoadedModel, choose_device, load_tokenizer
from moelpr.megatron_patches import cpu, megatron_fixes
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER


@dataclass(frozen=True)
class MegatronModel(LoadedModel):
    """`model` is Megatron's GPTModel with our MoE layers."""

    spec: ModelSpec

    @property
    def vocab_size(self) -> int:
        return self.spec.megatron_args["vocab_size"]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, tokens_BS: Tensor) -> Tensor:
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        return self.model(tokens_BS, positions, attention_mask=None)[..., : self.vocab_size]

    @property
    def routers(self) -> dict[int, nn.Module]:
        return {
            number: layer.mlp.router
            for number, layer in enumerate(self.model.decoder.layers)
            if hasattr(layer.mlp, "router")
        }

    def router_logits(self, router: Any, inputs: Any, output: Any) -> Tensor:
        """The router returns its choices only, so its linear map is applied once more, to the same hidden states."""
        hidden_SBH = inputs[0]
        return router.gating(hidden_SBH).transpose(0, 1).flatten(0, 1)

    @property
    def num_original_experts(self) -> int:
        return self.spec.moe.num_original_experts if self.spec.moe else 1

    @property
    def topk(self) -> int:
        return self.spec.moe.topk if self.spec.moe else 1


@contextmanager
def open_megatron_model(directory: Path, device: str = "auto", dtype: str = "auto") -> Iterator[MegatronModel]:
    """The newest checkpoint in `directory`; torch.distributed and Megatron's groups are up inside the `with` block.

    device and dtype: see `moelpr.evaluate.models.load_model`. Raises UserError where the checkpoint is incomplete.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with _without_warnings():
        cpu.install()  # before Megatron is imported; does nothing where a GPU is present
        megatron_fixes.install()
        from moelpr.model import loading

    spec = ModelSpec.read(directory)
    tokenizer = load_tokenizer(directory / HF_FOLDER)
    torch_device = choose_device(device)
    if torch_device.type != ("cpu" if cpu.is_needed() else "cuda"):
        raise UserError(
            f"a Megatron checkpoint runs on the GPU where there is one, not on {device}; export it with "
            "checkpoint_convert/mcore_to_hf.py, or hide the GPU (CUDA_VISIBLE_DEVICES=)"
        )
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    with loading.single_process():
        with _without_warnings():
            model = loading.load_model(directory, **_element_type(spec, dtype, torch_device)).eval()
        yield MegatronModel(directory, model, *tokenizer, spec=spec)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Megatron warns of what is as it should be here: no Apex, one process, its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _element_type(spec: ModelSpec, dtype: str, device: torch.device) -> dict[str, Any]:
    """Fields of the model's configuration."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else spec.dtype
    return {
        "params_dtype": getattr(torch, dtype),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
