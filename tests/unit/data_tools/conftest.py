"""Small corpora with manifests, small tokenizers of both types, and preprocessing jobs that run in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from data_tools import preprocess_data
from data_tools.corpus.corpus import Corpus, CorpusPaths
from data_tools.corpus.corpus_writer import CorpusWriter
from data_tools.corpus.tokenized import Documents, joined_runs
from moelpr.base.settings import call
from moelpr.data.manifest import LanguageCount, Manifest, Source, TokenizerRecord, manifest_path
from tests.support.small_tokenizers import byte_level_bpe, save_fast, train_sentencepiece

ORIGINAL = {"en", "es", "zh"}
Document = tuple[str, list[int]]  # its language and its token ids


def make_corpus_in(
    folder: Path, name: str, documents: list[Document], vocab_size: int = 300, manifest: bool = True, **words: str
) -> Path:
    counts: dict[str, LanguageCount] = {}
    record = {"fingerprint": "f", "vocabulary_sha256": "v"} | words
    tokenizer = TokenizerRecord("HuggingFaceTokenizer", "hf", vocab_size, 0, True, **record)
    with CorpusWriter(folder / name, vocab_size) as writer:
        for language, ids in documents:
            is_original = language in ORIGINAL
            writer.add_document(np.array(ids, np.int32), is_original)
            count = counts.setdefault(language, LanguageCount("original" if is_original else "expanded"))
            count.add(1, len(ids), 4 * len(ids))
        source, files = Source(f"{name}.jsonl", 10, None, len(documents)), writer.finalize()
        made = Manifest(tokenizer, True, [source], counts, len(documents), writer.at.tokens, 1, files)
        writer.commit(made if manifest else None)
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


def documents(count: int = 60) -> list[dict[str, str]]:
    """Documents of all languages, one in four of them empty, with a title next to each text."""
    languages = [*SENTENCES] * count
    texts = [" ".join([SENTENCES[languages[i]]] * (i % 4)) for i in range(count)]
    return [{"text": text, "title": f"title {i}", "lang": languages[i]} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that starts every text with <s>, as Llama's tokenizers do."""
    import transformers.models.auto.tokenization_auto  # noqa: F401  # 2 s; processes that load a tokenizer inherit it

    tokenizer = byte_level_bpe([*SENTENCES.values()] * 5, 500, ["<s>", "</s>", "<|endoftext|>"])
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    tokenizer.enable_truncation(4)  # some published files contain such a setting, which must be ignored
    return save_fast(tmp_path_factory.mktemp("hf"), tokenizer, bos_token="<s>")


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


@dataclass(frozen=True)
class Output:
    """The output of a job: a corpus for each key of text."""

    prefix: Path

    def path(self, key: str = "text") -> str:
        return f"{self.prefix}_{key}_document"

    def corpus(self, key: str = "text") -> Corpus:
        return Corpus(self.path(key))

    def manifest(self, key: str = "text") -> Manifest:
        return Manifest.read_file(manifest_path(self.path(key)))

    def content(self, key: str = "text") -> list[bytes]:
        return corpus_bytes(self.path(key))


def corpus_bytes(prefix: Path | str) -> list[bytes]:
    return [path.read_bytes() for path in CorpusPaths.of(prefix)]


@pytest.fixture
def preprocess(tmp_path: Path, write_lines: Callable[..., Path], hf_tokenizer: Path) -> Callable[..., Output]:
    """Runs a job in this process: flags, and among them input as documents, which are written to a file."""

    def run(*words: Any, tokenizer: Path = hf_tokenizer, out: str = "out/a", workers: int = 1) -> Output:
        kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
        given: list[Any] = ["--tokenizer-type", kind, "--tokenizer-model", tokenizer, "--workers", workers]
        for word in ("--output-prefix", tmp_path / out, *words):
            given += ["--input", write_lines("lines.jsonl", word)] if isinstance(word, list) else [word]
        call(preprocess_data.main, [*map(str, given)])
        return Output(tmp_path / out)

    return run
