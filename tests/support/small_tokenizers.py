"""Small tokenizers of the kinds that can be extended, and text in two original and two expanded languages."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moelpr.project.toy import documents_in

CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


ORIGINAL = {language: documents_in(language, 150) for language in ("en", "es")}
EXPANDED = {language: documents_in(language, 150) for language in ("el", "hu")}


def byte_level_bpe(
    texts: Iterable[str], vocab_size: int = 300, special: Sequence[str] = ("<s>", "</s>"), **options: Any
) -> Tokenizer:
    """A byte-level BPE. options: of the model."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special], **words)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_sentencepiece(prefix: Path, texts: Iterable[str], vocab_size: int, **options: Any) -> Path:
    """Write PREFIX.model, with fewer tokens if the texts have not so many."""
    options |= {"model_prefix": str(prefix), "vocab_size": vocab_size, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **options)
    prefix.with_suffix(".vocab").unlink()
    return prefix.with_suffix(".model")


def save_fast(folder: Path, tokenizer: Tokenizer, kind: str = "PreTrainedTokenizerFast", **config: Any) -> Path:
    """Save a tokenizer as transformers has it."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": kind, "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def save_qwen(folder: Path) -> None:
    from transformers import Qwen2Tokenizer

    texts = [text for documents in ORIGINAL.values() for text in documents]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 500, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_llama3(folder: Path) -> None:
    """Words that are tokens need no merges, and special tokens stand above the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    parts = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for documents in ORIGINAL.values() for text in documents), trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|user|>"])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    save_fast(folder, tokenizer, chat_template=CHAT_TEMPLATE, **names)


def save_llama2(folder: Path) -> None:
    from transformers import LlamaTokenizer

    folder.mkdir()
    lines = (line for documents in ORIGINAL.values() for text in documents for line in text.split("\n"))
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train_sentencepiece(folder / "tokenizer", lines, 500, model_type="bpe", byte_fallback=True, **options)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


KINDS = {"qwen": save_qwen, "llama3": save_llama3, "llama2": save_llama2}
