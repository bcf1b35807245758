"""Megatron's dataset of samples over corpora, with the settings that tests share."""

from typing import Any

from moelpr.model.megatron import bootstrap

bootstrap.install_patches()

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig  # noqa: E402

from moelpr.data.dataset import TaggedGPTDataset, TokenIds  # noqa: E402

_OFF = "reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask".split()


def gpt_config(
    prefixes: list[str], weights: list[float] | None = None, vocab_size: int = 500, **changes: Any
) -> GPTDatasetConfig:
    """The configuration of a training set of these corpora, in samples of 16 tokens."""
    settings: dict[str, Any] = {"random_seed": 3, "sequence_length": 16, "split": "100,0,0"}
    settings |= {"tokenizer": TokenIds(vocab_size), **dict.fromkeys(_OFF, False)}
    return GPTDatasetConfig(blend=(prefixes, weights), **settings | changes)


def training_set(num_samples: int, config: GPTDatasetConfig, kind: type = TaggedGPTDataset) -> Any:
    """The training samples, built on this process alone."""
    train, *_ = BlendedMegatronDatasetBuilder(kind, [num_samples, 0, 0], lambda: True, config).build()
    return train
