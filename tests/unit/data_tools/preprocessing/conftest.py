"""Small tokenizers of both types, and jobs that run in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers.models.auto.tokenization_auto  # noqa: F401  # 2 s; the process that loads a tokenizer inherits it
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_tools import preprocess_data
from data_tools.corpus import CorpusPaths

SENTENCES = {
    "en": "Turn on the light in the kitchen, please, and close the door.",
    "es": "Enciende la luz de la cocina, ¡por favor!, y cierra la puerta.",
    "zh": "打开厨房的灯。请关上门。",
    "el": "Ανάψτε το φως στην κουζίνα και κλείστε την πόρτα.",
    "hu": "Kapcsolja fel a lámpát a konyhában, és csukja be az ajtót.",
}


@pytest.fixture(scope="session")
def sentences() -> dict[str, str]:
    return SENTENCES


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that starts every text with <s>, as Llama's tokenizers do."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES.values()] * 5, trainer)
    special = [("<s>", 0)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=special),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE with bytes to fall back on, as Llama 2's is."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES.values()] * 5),
        model_prefix=str(prefix),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=480,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(params=["hf", "sp"])
def tokenizer(request: pytest.FixtureRequest, hf_tokenizer: Path, sp_tokenizer: Path) -> Path:
    return hf_tokenizer if request.param == "hf" else sp_tokenizer


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, documents: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        path.write_text("".join(lines), "utf-8")
        return path

    return write


@pytest.fixture
def preprocess(tmp_path: Path) -> Callable[..., Path]:
    """Runs a job in this process; its output prefix."""

    def run(tokenizer: Path, *words: str | Path, out: str = "out/a", workers: int = 1) -> Path:
        kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
        fixed = ["--tokenizer-type", kind, "--tokenizer-model", str(tokenizer), "--workers", str(workers)]
        preprocess_data.main([*map(str, words), *fixed, "--output-prefix", str(tmp_path / out)])
        return tmp_path / out

    return run


@pytest.fixture
def corpus_bytes() -> Callable[[Path | str], list[bytes]]:
    return lambda prefix: [path.read_bytes() for path in CorpusPaths.of(prefix)]
