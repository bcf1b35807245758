"""Tiny models with random weights and a byte-level tokenizer: every number can be worked out by a plain loop."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

TEXTS = {
    "en": [
        "The door is open.",
        "Turn the light on when somebody comes home late, and off again in the morning.",
        "Yes",
    ],
    "el": ["Η πόρτα είναι ανοιχτή.", "Άναψε το φως όταν κάποιος γυρίζει αργά στο σπίτι και σβήσε το το πρωί."],
    "zh": ["门是开着的。", "有人晚回家时开灯,早上再关掉。😀"],
}
SHAPE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([text for group in TEXTS.values() for text in group], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory, tokenizer) -> Path:
    """A stock Qwen2 directory."""
    return save(Qwen2ForCausalLM, Qwen2Config(vocab_size=len(tokenizer), **SHAPE), tokenizer, tmp_path_factory, "dense")


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory, tokenizer) -> Path:
    """A stock Qwen2Moe directory as the exporter writes it: no shared expert, layer 1 stays dense."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=0, norm_topk_prob=True, mlp_only_layers=[1], **SHAPE,
    )  # fmt: skip
    return save(Qwen2MoeForCausalLM, config, tokenizer, tmp_path_factory, "moe")


def save(model_class, config, tokenizer, tmp_path_factory, name: str) -> Path:
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():  # routers start at zero in transformers: give them something to say
        for parameter in model.parameters():
            if parameter.numel():
                parameter.normal_(std=0.3)
    directory = tmp_path_factory.mktemp(name) / name
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
