"""Readers other than transformers: who runs an export, and vLLM's loader where it is installed.

vLLM pins a PyTorch of its own and so needs an environment of its own; nothing is computed, so a CPU is enough:

    python3.13 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm pytest pytest-timeout hypothesis
    /tmp/vllm/bin/python -m pytest tests/unit/checkpoint_convert/card/test_readers.py
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_convert.card.readers import READERS, obstacle, readers_sentence
from moelpr.model.families.families import FAMILIES
from moelpr.model.families.moe_classes import MOE_CLASSES
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.support.hf_models import tensors_of, write_export

MIXTRAL = tuple(f"block_sparse_moe.experts.{{j}}.{name}.weight" for name in ("w1", "w3", "w2"))
QWEN = tuple(f"mlp.experts.{{j}}.{name}_proj.weight" for name in ("gate", "up", "down"))
GRANITE = tuple(f"block_sparse_moe.{name}_linear.weight" for name in ("input", "output"))
STACKS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
HYBRID = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
# Base, its settings and --as; and the names of an expert's gate, up and down projections, or of the stacks of them.
EXPORTS = {
    "llama": ("LlamaForCausalLM", {}, None, MIXTRAL),
    "mistral": ("MistralForCausalLM", {"tie_word_embeddings": True}, None, MIXTRAL),
    "qwen2": ("Qwen2ForCausalLM", {}, None, QWEN),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, None, QWEN),
    "llama-as-granitemoe": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "granitemoe", GRANITE),
    "granite": ("GraniteForCausalLM", {"residual_multiplier": 0.22}, None, GRANITE),
    "ernie": ("Ernie4_5ForCausalLM", {"head_dim": 16}, None, QWEN),
    "olmo2": ("Olmo2ForCausalLM", {}, None, QWEN),
    "qwen3.5": ("Qwen3_5ForCausalLM", HYBRID, None, STACKS),
}
LAYERS, EXPERTS = 4, 4


@pytest.fixture
def export(name: str, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Experts that differ, in two shards."""
    architecture, changes, as_class, _ = EXPORTS[name]
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # vLLM's kernels require multiples of 16
    dense = make_model(architecture, **changes, **sizes)
    return write_export(dense, tmp_path, NewExperts(3), noise=0.5, max_shard_bytes=800_000, as_class=as_class)


def expert(tensors: dict[str, Tensor], name: str, layer: int, number: int) -> tuple[Tensor, Tensor]:
    """The rows of gate and up projection, and the down projection."""
    prefix, names = f"model.layers.{layer}.", EXPORTS[name][3]
    if names in (GRANITE, STACKS):
        fc1, fc2 = (tensors[prefix + stack][number] for stack in names)
        return fc1, fc2
    gate, up, down = (tensors[prefix + part.format(j=number)] for part in names)
    return torch.cat([gate, up]), down


LLAMA = {"add_qkv_bias": False}
SCALED = LLAMA | {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
ALL, LLAMA_CPP, MLX, VLLM = {*READERS}, "llama.cpp", "mlx", "vllm"


@pytest.mark.parametrize(
    ("family", "changes", "moe_class", "obstructed", "classes"),
    [
        ("llama", LLAMA, "mixtral", set(), set()),
        ("llama", SCALED, "mixtral", {MLX}, {"granitemoe"}),
        ("llama", SCALED, "granitemoe", {LLAMA_CPP}, {"mixtral"}),
        ("mistral", LLAMA | {"window_size": [30, 0]}, "mixtral", {LLAMA_CPP, MLX}, set()),
        ("mistral", LLAMA | {"kv_channels": 16}, "mixtral", {MLX}, set()),
        ("qwen2", {}, "qwen2_moe", {LLAMA_CPP, MLX}, {"granitemoe"}),
        ("qwen2", {}, "granitemoe", {VLLM}, {"qwen2_moe"}),
    ],
)
def test_a_sentence_says_who_runs_an_export_and_which_class_the_others_need(
    dense_spec: ModelSpec, family: str, changes: dict, moe_class: str, obstructed: set[str], classes: set[str]
) -> None:
    spec = ModelSpec(family, "float32", dense_spec.megatron_args | changes, MoeSpec(4, 2, (0, 1, 2)))
    written = FAMILIES[family].written_as(MOE_CLASSES[moe_class])
    config = written.export_config({}, spec, "float32")
    assert {reader for reader in READERS if obstacle(reader, config)} == obstructed
    running, *others = re.findall(r"(?:Runs in|For) [^.]*(?:\.cpp[^.]*)?\.", readers_sentence(written, spec, config))
    assert all((READERS[reader] in running) == (reader not in obstructed) for reader in ALL)
    assert {READERS[reader] for reader in obstructed} == {name for name in READERS.values() if name in "".join(others)}
    assert set(re.findall(r"--as (\w+)", "".join(others))) == classes


@contextmanager
def vllm_model(folder: Path, rendezvous: Path) -> Iterator[torch.nn.Module]:
    """The model as vLLM's own class and loader make it, on a CPU and before any kernel."""
    from vllm import distributed
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    options = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 64}
    config = EngineArgs(model=str(folder), **options).create_engine_config()
    with set_current_vllm_config(config):
        distributed.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
        try:
            with set_default_torch_dtype(torch.float32):
                model = initialize_model(config)
            weights = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
            loaded = model.load_weights(weights)
            assert set(dict(model.named_parameters())) == set(loaded)
            yield model
        finally:
            distributed.cleanup_dist_env_and_memory()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_loads_every_weight_where_it_belongs(export, name, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    tensors = tensors_of(export)
    with vllm_model(export, tmp_path / "rendezvous") as model:
        parameters = dict(model.named_parameters())
        for i in range(LAYERS):
            of_layer = {key: value for key, value in parameters.items() if key.startswith(f"model.layers.{i}.")}
            (gate_up,) = [value for key, value in of_layer.items() if key.endswith("w13_weight")]
            (down,) = [value for key, value in of_layer.items() if key.endswith("w2_weight")]
            for j in range(EXPERTS):
                assert all(map(torch.equal, (gate_up[j], down[j]), expert(tensors, name, i, j)))
        routed = [module for module in model.modules() if hasattr(module, "renormalize")]
        assert {(module.top_k, module.renormalize) for module in routed} == {(2, True)}
        window = getattr(model.config, "sliding_window", None)
        assert window == (4096 if name == "mistral" else None)
        assert model.config.rope_parameters["rope_theta"] == 50000
