"""Open a model for evaluation: a Hugging Face directory or a Megatron checkpoint folder, behind one interface.

A Hugging Face directory is opened with transformers' own classes, from safetensors files only. Nothing is downloaded,
and code that comes with a model is never run. A Megatron checkpoint is opened with the trainer's own code.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from moelpr.base import checksums, records
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError, first_line
from moelpr.base.machine import format_bytes, free_memory
from moelpr.base.records import FOREIGN
from moelpr.base.run_folder import HF_FOLDER
from moelpr.base.versions import install_command
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.measure.evaluate.llama_cpp import Gguf
from moelpr.model.families.hf_config import check_model, is_gguf, read_config, transformers_config
from moelpr.model.megatron import bootstrap, cpu
from moelpr.model.model_spec import FILE_NAME, ModelSpec


@pydantic_dataclass(frozen=True, config=FOREIGN)
class WeightIndex:
    """model.safetensors.index.json of transformers.

    Attributes:
        weight_map: The name of a tensor -> the file that has it.
    """

    weight_map: dict[str, str]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer."""

    directory: Path
    model: Any  # a transformers PreTrainedModel with a language-model head, or Megatron's model with our MoE layers
    tokenizer: Any  # a transformers PreTrainedTokenizerBase
    start_id: int  # the token that precedes every document: BOS, or EOS if the tokenizer has no BOS
    eos_id: int | None
    vocab_size: int  # number of token embeddings
    # Tokens [batch, sequence] -> logits [batch, sequence, vocabulary] of one forward pass. Pad on the right.
    logits: Callable[[Tensor], Tensor]
    # By decoder layer number (from 0); empty for a dense model, and for a GGUF file, whose routers cannot be seen.
    routers: dict[int, nn.Module] = field(default_factory=dict)
    # (router, inputs, output) of a forward hook -> logits [T, experts]; T: over batch, then sequence.
    router_logits: Callable[[Any, Any, Any], Tensor] = lambda router, inputs, output: output
    num_original_places: int = 1  # P, the first experts of a router
    topk: int = 1  # K

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def unknown_id(self) -> int | None:
        """The ID of the token for text that the tokenizer cannot encode; None if it has no such token."""
        # A tokenizer that names its EOS as unknown token (GPT-2, Qwen2) never has to use it.
        return None if self.tokenizer.unk_token_id == self.eos_id else self.tokenizer.unk_token_id


def hf_model(directory: Path, model: Any, tokenizer: Any, start_id: int, eos_id: int | None) -> LoadedModel:
    """A transformers model behind the common interface."""
    config = model.config
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    layers = getattr(model.get_decoder(), "layers", []) if num_experts else []
    opened = directory, model, tokenizer, start_id, eos_id
    return LoadedModel(
        *opened,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        # No attention mask: padding is on the right, which the tokens of a causal model do not attend to.
        logits=lambda tokens_BS: model(input_ids=tokens_BS, use_cache=False).logits,
        routers={  # Mixtral and Qwen name their routers `gate`, GraniteMoe `router`; the weight is [E, hidden].
            number: module
            for number, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if name.rsplit(".", 1)[-1] in ("gate", "router") and module.weight.shape[0] == num_experts
        },
        # Some return a tuple: logits, top-k weights, top-k indices.
        router_logits=lambda _, inputs, output: (output[0] if isinstance(output, tuple) else output).flatten(0, -2),
        # Our exports record it in config.json; transformers keeps fields that it does not use.
        num_original_places=getattr(config, "num_original_experts", 1),
        topk=getattr(config, "num_experts_per_tok", None) or 1,
    )


def is_megatron(directory: Path) -> bool:
    """Whether `directory` is a checkpoint folder of the converter or the trainer, not a Hugging Face directory."""
    return (directory / FILE_NAME).is_file()


@contextmanager
def open_model(
    directory: Path, device: str = "auto", dtype: str = "auto", verify: Verify = Verify.FULL
) -> Iterator[LoadedModel]:
    """Load the model in `directory`, of any kind, for the duration of the `with` block; see `load_model`.

    For a checkpoint, the latest one in `directory`, torch.distributed is initialized inside the block.
    """
    if is_gguf(directory):
        with closing(Gguf(directory)) as file:  # nn.Linear stands for the model: its weight is on the CPU
            ids = file.start_id, file.eos_id, file.vocab_size
            yield LoadedModel(directory, nn.Linear(1, 1), file, *ids, file.logits)
        return
    gc.collect()  # the previous model's memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if not is_megatron(directory):
        yield load_model(directory, device, dtype, verify)
        return
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Megatron warns about what is intended here: no Apex, one process; and about its own deprecations.
        warnings.simplefilter("ignore")
        bootstrap.install_patches()
        from moelpr.model.layers import loading  # Megatron takes seconds to import

    spec = ModelSpec.read(directory)
    tokenizer = _load_tokenizer(directory / HF_FOLDER)
    torch_device = choose_device(device)
    if torch_device.type != ("cpu" if cpu.is_needed() else "cuda"):
        raise UserError(
            f"--device {device}: a Megatron checkpoint runs on the GPU if there is one; export it with "
            "moelpr model export, or hide the GPU (CUDA_VISIBLE_DEVICES=)"
        )
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    dtype = resolve_dtype(dtype, torch_device)
    dtype = spec.dtype if dtype == "auto" else dtype
    config = {"params_dtype": getattr(torch, dtype), "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    with bootstrap.single_process():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = loading.load_model(directory, verify, **config).eval()
        vocab_size = spec.megatron_args["vocab_size"]

        def logits(tokens_BS: Tensor) -> Tensor:
            positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
            return model(tokens_BS, positions, attention_mask=None)[..., :vocab_size]

        layers = enumerate(model.decoder.layers)
        yield LoadedModel(
            directory,
            model,
            *tokenizer,
            vocab_size=vocab_size,
            logits=logits,
            routers={number: layer.mlp.router for number, layer in layers if hasattr(layer.mlp, "router")},
            # The router returns only its choices, so its linear map is applied again to its input [S, B, H].
            router_logits=lambda router, inputs, output: router.gating(inputs[0]).transpose(0, 1).flatten(0, 1),
            num_original_places=spec.moe.num_original_places if spec.moe else 1,
            topk=spec.moe.topk if spec.moe else 1,
        )


def load_model(directory: Path, device: str = "auto", dtype: str = "auto", verify: Verify = Verify.FULL) -> LoadedModel:
    """Load a Hugging Face directory.

    Args:
        directory: config.json, *.safetensors and a tokenizer.
        device: "auto" (a GPU if there is one, and several for a model that does not fit on one), "cpu", "cuda" or
            "cuda:N".
        dtype: "auto" (float32 on a CPU, the checkpoint's own dtype on a GPU), "float32", "bfloat16" or "float16".

    Raises:
        UserError: the directory is not a model, is incomplete, needs code of its own, or does not fit.
    """
    check_model(directory, is_hf=True)
    torch_device = choose_device(device)
    placement = _placement(directory, torch_device, dtype, is_chosen=device != "auto")
    if verify is not Verify.NONE:
        checksums.verify_folder(directory, "copy or download it again")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = resolve_dtype(dtype, torch_device)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing weights: see below
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the empty shared expert, see below
            options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **placement}
            options |= {"config": transformers_config(directory), "trust_remote_code": False}
            model, loading_info = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers and safetensors each raise errors of their own
        raise UserError(f"{directory} cannot be opened as a causal language model: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers initializes missing weights at random and continues: that is a different model. An upcycled Qwen2Moe
    # has a shared expert of size 0, whose empty matrices are not in the file.
    tensors = model.state_dict()
    if missing := sorted(key for key in loading_info["missing_keys"] if key not in tensors or tensors[key].numel() > 0):
        raise UserError(
            f"the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them; export the model again"
        )
    if not placement:
        model.to(torch_device)
    return hf_model(directory, model.eval(), *_load_tokenizer(directory))


def _placement(directory: Path, device: torch.device, dtype: str, is_chosen: bool) -> dict[str, Any]:
    """Arguments of from_pretrained that spread a model over GPUs, leaving a tenth of each; {} if one is enough."""
    if device.type != "cuda":
        if (needed := _weight_bytes(directory, resolve_dtype(dtype, device))) > (own := free_memory()):
            raise UserError(
                f"{directory} takes about {format_bytes(needed)} of memory, and {format_bytes(own)} are free; use "
                "--dtype bfloat16, which takes half of float32, or a machine with more"
            )
        return {}
    needed, own = _weight_bytes(directory, dtype), _free_bytes(device.index)
    if needed <= own:
        return {}
    free = {number: _free_bytes(number) for number in range(torch.cuda.device_count())}
    has_accelerate = find_spec("accelerate") is not None
    if is_chosen or needed > sum(free.values()) or not has_accelerate:
        raise UserError(
            f"{directory} takes {format_bytes(needed)}, GPU {device.index} has {format_bytes(own)} for it, and all "
            f"{len(free)} GPUs {format_bytes(sum(free.values()))}; "
            + ("" if has_accelerate else f"run {install_command('eval')} and ")
            + "use --device auto with enough GPUs, or --device cpu --dtype bfloat16"
        )
    return {"device_map": "auto", "max_memory": free}


def _free_bytes(gpu: int) -> int:
    """Free memory of a GPU but a tenth; 0 if it cannot be used, because another process has it to itself."""
    try:
        return int(0.9 * torch.cuda.mem_get_info(gpu)[0])
    except RuntimeError:
        return 0


def _weight_bytes(directory: Path, dtype: str) -> int:
    """The size of the weights in `dtype` ("auto": their own), from the files that transformers reads."""
    files, index = [directory / "model.safetensors"], directory / "model.safetensors.index.json"
    if not files[0].is_file():
        files = [*directory.glob("*.safetensors")]
        with suppress(UserError):  # reading the model reports it
            files = [directory / name for name in {*records.read(WeightIndex, index, "").weight_map.values()}]
    size = sum(file.stat().st_size for file in files if file.is_file())
    config = read_config(directory)
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if dtype == "auto" or not isinstance(stored, torch.dtype):
        return size
    return size * getattr(torch, dtype).itemsize // stored.itemsize


def read_max_positions(directory: Path) -> int | None:
    """The longest input in tokens; None for no limit. A UserError if `directory` is not a model."""
    if is_gguf(directory):
        return None  # llama.cpp computes any length
    if is_megatron(directory):
        return ModelSpec.read(directory).megatron_args["max_position_embeddings"]
    check_model(directory, is_hf=True)
    return read_config(directory).get("max_position_embeddings")


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """ "float32" for "auto" on a CPU; "auto" on a GPU is the model's own."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


def choose_device(name: str) -> torch.device:
    """The device that --device names; "auto" is a GPU if any.

    A GPU has an index, without which torch.cuda.set_device does not accept it.

    Raises:
        UserError: It is unavailable, or would silently be the CPU of a machine with GPUs.
    """
    if name == "auto" and (problem := cpu.unusable_gpus()):
        raise UserError(problem)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    invalid = UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid from error
    if device.type not in ("cpu", "cuda"):
        raise invalid
    if device.type == "cpu":
        return device
    if (index := device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is unavailable, {torch.cuda.device_count()} GPUs are visible; use cpu")
    return torch.device("cuda", index)


def _load_tokenizer(directory: Path) -> tuple[Any, int, int | None]:
    """The tokenizer in `directory`, the token that precedes a document, and EOS."""
    tokenizer = open_hf_tokenizer(directory)
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError(f"the tokenizer in {directory} has neither BOS nor EOS; add one: every document starts with it")
    return tokenizer, start_id, tokenizer.eos_token_id
