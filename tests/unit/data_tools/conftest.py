"""Small corpora with manifests, small tokenizers of both types, and preprocessing jobs that run in this process."""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from data_tools import preprocess_data
from data_tools.corpus.corpus import CorpusPaths
from data_tools.corpus.corpus_writer import CorpusWriter
from data_tools.corpus.tokenized import Documents, joined_runs
from moelpr.base.settings import call
from moelpr.data.manifest import LanguageCount, Manifest, Source, TokenizerRecord
from tests.support.small_tokenizers import byte_level_bpe, train_sentencepiece

ORIGINAL = {"en", "es", "zh"}
Document = tuple[str, list[int]]  # its language and its token ids


def make_corpus_in(
    folder: Path, name: str, documents: list[Document], vocab_size: int = 300, manifest: bool = True, **words: str
) -> Path:
    counts: dict[str, LanguageCount] = {}
    per_language = defaultdict(list)
    with CorpusWriter(folder / name, vocab_size) as writer:
        for language, ids in documents:
            writer.add_document(np.array(ids, np.int32), language in ORIGINAL)
            per_language[language].append(len(ids))
        for language, lengths in per_language.items():
            bit = "original" if language in ORIGINAL else "expanded"
            counts[language] = LanguageCount(bit, len(lengths), sum(lengths), 4 * sum(lengths))
        files = writer.finalize()
        record = {"fingerprint": "f", "vocabulary_sha256": "v"} | words
        writer.commit(
            Manifest(
                tokenizer=TokenizerRecord("HuggingFaceTokenizer", "hf", vocab_size, 0, True, **record),
                append_eod=True,
                sources=[Source(f"{name}.jsonl", 10, None, len(documents))],
                languages=counts,
                documents=len(documents),
                tokens=writer.num_tokens,
                skipped_lines=1,
                files=files,
            )
            if manifest
            else None
        )
    return folder / name


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    return partial(make_corpus_in, tmp_path)


def write_mixed_corpus(prefix: Path, *documents: list[int]) -> Path:
    """Documents whose bits change inside, given for runs of 2, 4 and 1 tokens, and no manifest."""
    with CorpusWriter(prefix, 300) as writer:
        for bits in documents:
            runs = joined_runs(np.array(bits, np.uint8), np.array([2, 4, 1]))
            writer.add(Documents(np.arange(7, dtype=np.uint16), np.array([7]), runs))
        writer.finalize()
        writer.commit()
    return prefix


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
    import transformers.models.auto.tokenization_auto  # noqa: F401  # 2 s; processes that load a tokenizer inherit it

    folder = tmp_path_factory.mktemp("hf")
    tokenizer = byte_level_bpe([*SENTENCES.values()] * 5, 500, ["<s>", "</s>", "<|endoftext|>"])
    special = [("<s>", 0)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=special),
        ]
    )
    tokenizer.enable_truncation(4)  # some published files contain such a setting, which must be ignored
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE with byte fallback, like Llama 2's."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    return train_sentencepiece(prefix, [*SENTENCES.values()] * 5, 480, model_type="bpe", byte_fallback=True)


@pytest.fixture(scope="session")
def unigram_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece unigram model, which gigatoken does not support."""
    return train_sentencepiece(tmp_path_factory.mktemp("unigram") / "tokenizer", [*SENTENCES.values()] * 5, 150)


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
        call(preprocess_data.main, [*fixed, "--output-prefix", str(tmp_path / out), *map(str, words)])
        return tmp_path / out

    return run


@pytest.fixture
def corpus_bytes() -> Callable[[Path | str], list[bytes]]:
    return lambda prefix: [path.read_bytes() for path in CorpusPaths.of(prefix)]
