"""Tiny random Hugging Face models of every family, made by stock transformers, and what tests do with them."""

import copy
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.model_files import TOKENIZER_FILES
from moelpr.base.errors import UserError
from moelpr.data.tokenizers.base import vocabulary_checksum
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.families.new_experts import NewExperts

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPE: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SHAPE |= {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}
# Fields of a Qwen3.5, whose layers have linear and full attention.
HYBRID: dict[str, Any] = {"head_dim": 16, "rope_parameters": SHAPE["rope_parameters"] | {"partial_rotary_factor": 0.25}}
HYBRID |= {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
# transformers' own class for models of this architecture, and their config.
RENAMED = {"IQuestCoderForCausalLM": ("LlamaForCausalLM", "IQuestCoderConfig")}
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 99


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random model of a transformers class; no tensor (biases and norms included) is constant."""

    def make(
        architecture: str,
        dtype: torch.dtype = torch.float32,
        tokenizer: bool = False,
        save: dict | None = None,
        **changes,
    ) -> Path:
        import transformers

        torch.manual_seed(0)
        name, config = RENAMED.get(architecture, (architecture, ""))
        model_class = getattr(transformers, name)
        model = model_class(getattr(transformers, config, model_class.config_class)(**(SHAPE | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(architecture)
        model.to(dtype).save_pretrained(folder, **(save or {}))
        edit_json(folder / "config.json", architectures=[architecture])
        if tokenizer:  # transformers has one of its own for Qwen3.5
            kind = "Qwen3_5Tokenizer" if architecture.startswith("Qwen3_5") else "Qwen2Tokenizer"
            save_tokenizer(folder, num_ids=60, kind=kind)
        return folder

    return make


@pytest.fixture(scope="session")
def make_qwen2(make_model: Callable[..., Path]) -> Callable[..., Path]:
    return partial(make_model, "Qwen2ForCausalLM")


@pytest.fixture(scope="session")
def qwen2(make_qwen2: Callable[..., Path]) -> Path:
    """Untied, fp32, in several shards, with a tokenizer of 60 IDs and a chat template. Tests must not change it."""
    return make_qwen2(tokenizer=True, save={"max_shard_size": "40KB"})


@pytest.fixture
def source(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:
    """One file, with a tokenizer; a test may change it."""
    return Path(shutil.copytree(make_qwen2(tokenizer=True), tmp_path / "source"))


def save_tokenizer(folder: Path, num_ids: int, kind: str = "Qwen2Tokenizer") -> None:
    """A byte-level BPE whose tokens are a, b and runs of a."""
    import transformers

    words = ["a", "b"] + ["a" * n for n in range(2, num_ids - 1)]
    vocab = {"<|endoftext|>": 0} | {word: k for k, word in enumerate(words, start=1)}
    tokenizer = getattr(transformers, kind)(vocab=vocab, merges=[("a", "a" * n) for n in range(1, num_ids - 2)])
    assert len(tokenizer) == num_ids
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


# The sizes of a tiny vision tower.
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_position_embeddings": 16}


def save_multimodal(dense: Path, folder: Path) -> Path:
    """A Qwen3.5 as the language model of a multimodal one, with a head that predicts further tokens."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(1)
    text = json.loads((dense / "config.json").read_text())
    vision = _VISION | {"out_hidden_size": text["hidden_size"], "patch_size": 4}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])
    shutil.copytree(dense, folder)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    others = {name: tensor for name, tensor in tensors_of(folder).items() if name.startswith("model.visual.")}
    language = {re.sub("^model", "model.language_model", name): tensor for name, tensor in tensors_of(dense).items()}
    head = {"mtp.layers.0.mlp.down_proj.weight": torch.randn(32, 48), "mtp.norm.weight": torch.randn(32)}
    save_file(others | language | head, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"mtp_num_hidden_layers": 1})
    # As published; transformers ignores it.
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    return folder


def save_extended_tokenizer(old: Path, folder: Path, new: list[tuple[str, str]]) -> Path:
    """The BPE tokenizer in `old` with more merges, and vocabulary_extension.json, as extend_tokenizer.py writes it."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(old))
    content = json.loads((old / "tokenizer.json").read_text())
    vocabulary, first = content["model"]["vocab"], tokenizer.vocab_size
    replaced = {token: [id] for token, id in vocabulary.items()}
    for id, (left, right) in enumerate(new, start=first):
        vocabulary[left + right] = id
        content["model"]["merges"].append([left, right])
        replaced[left + right] = replaced[left] + replaced[right]
    folder.mkdir(parents=True)
    for file in {*TOKENIZER_FILES, "chat_template.jinja"} & {path.name for path in old.iterdir()}:
        shutil.copyfile(old / file, folder / file)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    replaces = [replaced[left + right] for left, right in new]
    checksum = vocabulary_checksum(tokenizer.vocabulary(), first)
    VocabularyExtension(first, replaces, tokenizer.fingerprint(), checksum).write(folder)
    return folder


def load_stock(folder: Path, architecture: str | None = None):
    """The model as stock transformers loads it; fails on any missing or unexpected weight."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert architecture is None or type(model).__name__ == RENAMED.get(architecture, (architecture,))[0]
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    parameters = dict(model.named_parameters())
    missing = [name for name in info["missing_keys"] if parameters[name].numel()]  # a shared expert of width 0
    assert not missing, missing
    return model.eval()


@torch.no_grad()
def stock_logits(model) -> Tensor:
    """Logits of TOKENS, from a model or its folder."""
    return (load_stock(model) if isinstance(model, Path) else model)(TOKENS).logits


class InDouble(TorchFunctionMode):
    """Computes in fp64 what a model of fp64 weights asks to compute in fp32, for example its norms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        words = {name: _double(word) for name, word in (kwargs or {}).items()}
        return func(*map(_double, args), **words)


def in_double(model):
    """A copy with fp64 weights; torch's grouped GEMM, the default of experts, does not compute in fp64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model


def _double(argument: object) -> object:
    return torch.float64 if argument is torch.float32 else argument


def assert_as_exact(found: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Check that `found` is about as close to `exact`, which is in fp64, as another computation in fp32.

    How close that is depends on the processor, and for linear attention on the length: 1e-6 to 1e-4 of logits around 2.
    """
    assert exact.dtype == torch.float64
    own_error = (reference - exact).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert (found - exact).abs().max().item() <= 4 * max(own_error, rounding)


def assert_logits(found: Tensor, model, tokens: Tensor = TOKENS) -> None:
    """Check logits against those of a model in stock transformers, or of its folder."""
    model = load_stock(model) if isinstance(model, Path) else model
    with torch.no_grad():
        reference = model(tokens).logits
        with InDouble():
            exact = in_double(model)(tokens).logits
    assert_as_exact(found, reference, exact)


def our_logits(folder: Path, tokens: Tensor = TOKENS, change: Callable[[Any], object] = id) -> Tensor:
    """Logits from the trainer's model code, after a change of the loaded model."""
    from moelpr.model.megatron import bootstrap

    bootstrap.install_patches()
    from moelpr.model.layers import loading

    with bootstrap.single_process():
        model = loading.load_model(folder)
        with torch.no_grad():
            change(model)
        return loading.logits(model, tokens)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def megatron_tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a release checkpoint."""
    reader = TorchDistReader(folder / "release")
    return {key: reader.read(key).clone() for key in reader.keys}


def edit_json(path: Path, remove: Container[str] = (), **changes: object) -> None:
    """Remove and set fields of a JSON object in a file."""
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(kept | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file, or of model.safetensors in a folder, in place."""
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (file.parent / "checksums.json").unlink(missing_ok=True)  # changed on purpose


def copy_of(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a folder, next to it, with changed tensors."""
    copy = Path(shutil.copytree(folder, folder.parent / "changed", dirs_exist_ok=True))
    edit_tensors(copy, change)
    return copy


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path → content of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FOUR = NewExperts(4)


def write_export(base: Path, folder: Path, experts: NewExperts | None, noise: float = 0.0, **options: Any) -> Path:
    """The export `folder`/hf, with options, of the checkpoint `folder`/megatron that is made of a model."""
    hf_to_mcore(base, folder / "megatron", experts, start=Start(noise=noise))
    mcore_to_hf(folder / "megatron", folder / "hf", **options)
    return folder / "hf"


def assert_import_fails(source: Path, tmp_path: Path, message: str, experts: NewExperts = FOUR, **options) -> None:
    """The import fails with a one-line message that matches, and leaves nothing."""
    with pytest.raises(UserError, match=message) as caught:
        hf_to_mcore(source, tmp_path / "out", experts, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def assert_nothing_left(tmp_path: Path) -> None:
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class RunsCode:
    """Unpickled without restrictions, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def replace_object(step: Path, key: str, value: object) -> None:
    """Append the value to the file that contains the object `key`, and point the table of contents to it."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.startswith(key))
    content = io.BytesIO()
    torch.save(value, content)
    with open(step / info.relative_path, "ab") as file:
        info.offset, info.length = file.tell(), len(content.getvalue())
        file.write(content.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
