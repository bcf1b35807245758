import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.training.argument_utils import core_transformer_config_from_args
from tokenizers import Tokenizer, models, pre_tokenizers

from moelpr.data.dataset import dataset_config
from moelpr.data.manifest import FileRecord, Manifest, TokenizerRecord, manifest_path
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE
from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.megatron import cpu
from moelpr.train.arguments import kernels
from moelpr.train.arguments.checks import data as checks
from tests.support.hf_models import save_extended_tokenizer, save_tokenizer

MASKING = "--dataloader-inter-document-masking"


def test_every_missing_corpus_is_named(upcycled: str, problems, tmp_path: Path) -> None:
    there = tmp_path / "corpus"
    actual = problems("stage1", upcycled, "--data-path", "0.5", "nowhere", "0.3", str(there), "0.2", "elsewhere")
    assert [line.split()[0] for line in actual] == ["nowhere.bin", "elsewhere.bin"]
    assert all("moelpr data preprocess" in line for line in actual)


def test_weights_may_be_numbers_of_tokens(upcycled: str, accepted, data: list[str], tmp_path: Path) -> None:
    args = accepted("stage1", upcycled, "--data-path", "8e9", data[1], "4e9", data[1])
    assert dataset_config(argparse.Namespace(**args)).blend == ([data[1], data[1]], [8e9, 4e9])


def test_document_masking_requires_our_attention(upcycled, accepted, problems, monkeypatch) -> None:
    for argv, is_on in (([], False), ([MASKING], True)):
        args = argparse.Namespace(**accepted("stage1", upcycled, *argv))
        assert dataset_config(args).inter_document_masking == is_on
        config = core_transformer_config_from_args(args, config_class=MoELPRConfig)
        assert config.dataloader_inter_document_masking == is_on
    monkeypatch.setattr(kernels, "is_installed", lambda module: module == "transformer_engine")
    with monkeypatch.context() as gpu:
        gpu.setattr(cpu, "is_needed", lambda: False)
        (actual,) = problems("stage1", upcycled, MASKING)
        (other,) = problems("stage1", upcycled, MASKING, "--transformer-impl", "local", "--mock-data")
    assert actual.startswith(MASKING) and "--transformer-impl local" in actual
    assert other.startswith("--mock-data")


def save_words(folder: Path, vocabulary: list[str]) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_manifest(prefix: str, folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
    record = TokenizerRecord.of("HuggingFaceTokenizer", str(folder), tokenizer, None, True)
    files = {name: FileRecord.of(Path(f"{prefix}.{name}")) for name in ("bin", "idx", "lang")}
    Manifest(record, False, [], {}, documents=1, tokens=1, skipped_lines=0, files=files).write(prefix)


def test_a_corpus_of_another_tokenizer_is_rejected(upcycled, data, problems, accepted, tmp_path, capfd, monkeypatch):
    prefix, hf = data[1], Path(upcycled) / "hf"
    assert accepted("stage1", upcycled)
    assert f"{prefix}.manifest.json is missing" in capfd.readouterr().err

    write_manifest(prefix, save_words(tmp_path / "theirs", ["a", "b", "c"]))
    assert accepted("stage1", upcycled)
    assert f"{hf} has no tokenizer" in capfd.readouterr().err

    save_words(hf, ["a", "c", "b"])
    checks._compare.cache_clear()
    (actual,) = problems("stage1", upcycled, "--seed", "1")
    assert prefix in actual and f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {hf}" in actual
    monkeypatch.setenv("RANK", "1")  # only rank 0 compares
    assert accepted("stage1", upcycled)
    monkeypatch.setenv("RANK", "0")

    write_manifest(prefix, hf)
    assert accepted("stage1", upcycled)
    assert "tokenizer" not in capfd.readouterr().err

    manifest_path(prefix).write_text("{}")
    (actual,) = problems("stage1", upcycled)
    assert f"{prefix}.manifest.json" in actual


def test_a_corpus_of_the_tokenizer_before_its_extension_is_rejected(
    upcycled, problems, accepted, tmp_path, capfd, write_corpus
):
    prefix, old, hf = write_corpus("en", True, True), tmp_path / "old", Path(upcycled) / "hf"
    save_tokenizer(old, num_ids=20)
    save_extended_tokenizer(old, hf, [("b", "b"), ("bb", "a")])
    write_manifest(prefix, old)
    for use in ("--data-path", "--validation-data"):
        (actual,) = problems("stage1", upcycled, use, prefix if use == "--data-path" else f"en={prefix}")
        assert "\n" not in actual and actual.startswith(f"{prefix} was made with the tokenizer before its extension")
        assert actual.endswith(f"again with --tokenizer-type HuggingFaceTokenizer --tokenizer-model {hf}")
    write_manifest(prefix, hf)
    assert accepted("stage1", upcycled, "--data-path", prefix)
    assert "tokenizer" not in capfd.readouterr().err
    (hf / VOCABULARY_EXTENSION_FILE).write_text("{}")
    checks._compare.cache_clear()
    (actual,) = problems("stage1", upcycled, "--data-path", prefix)
    assert VOCABULARY_EXTENSION_FILE in actual


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bin": lambda content: bytes(len(content)),
    "idx": lambda content: content[:-1] + b"\1",
    "lang": lambda content: bytes(byte ^ 255 for byte in content),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("use", ["--data-path", "--validation-data"])
def test_a_damaged_corpus_does_not_start(upcycled, problems, accepted, write_corpus, monkeypatch, name, use) -> None:
    prefix = write_corpus("en", True, True)
    write_manifest(prefix, save_words(Path(upcycled) / "hf", ["a", "b", "c"]))
    command = ["stage1", upcycled, use, prefix if use == "--data-path" else f"en={prefix}"]
    accepted(*command)
    path = Path(f"{prefix}.{name}")
    content = path.read_bytes()
    path.write_bytes(content[:64] + DAMAGE[name](content[64:]))
    for extent in ([], ["--verify-corpus", "full"]):
        (actual,) = problems(*command, *extent)
        assert actual.startswith(f"{path} ") and "damaged" in actual and "moelpr data preprocess" in actual
    accepted(*command, "--verify-corpus", "none")
    manifest_path(prefix).unlink()
    if name == "lang":  # it has a checksum of its own
        assert problems(*command)[0].startswith(f"{path} is damaged")
    monkeypatch.setenv("LOCAL_RANK", "1")  # one rank per node reads
    accepted(*command)


def test_validation_corpora_of_two_languages_are_accepted(upcycled: str, accepted, write_corpus) -> None:
    items = [f"en={write_corpus('en', True, True)}", f"el={write_corpus('el', False)}"]
    final = accepted("stage1", upcycled, "--validation-data", *items, "--eval-iters", "10", "--eval-interval", "5")
    assert final["validation_data"] == items


def test_the_lpr_loss_requires_original_language_tokens_in_one_corpus(
    upcycled, problems, accepted, write_corpus
) -> None:
    new, old = (write_corpus(name, bit) for name, bit in (("new", False), ("old", True)))
    (actual,) = problems("stage2", upcycled, "--data-path", new, new)
    assert actual.startswith(f"--data-path {new} {new} ") and "pass --lpr-loss-coeff 0" in actual
    (actual,) = problems("stage1", upcycled, "--lpr-loss-coeff", "0.2", "--data-path", new)
    assert "--lpr-loss-coeff 0.2 requires" in actual
    for argv in (["0.9", new, "0.1", old], [new, "--lpr-loss-coeff", "0"]):
        accepted("stage2", upcycled, "--data-path", *argv)
    accepted("stage1", upcycled, "--data-path", new)
    Path(f"{old}.lang").write_bytes(b"")
    assert problems("stage2", upcycled, "--data-path", old)[0].startswith(f"{old}.lang ")


def test_corpora_in_a_read_only_folder_need_a_cache_folder(
    upcycled, accepted, problems, tmp_path, monkeypatch, write_corpus
) -> None:
    """The rights are a stand-in's: root may write everywhere."""
    new, other = write_corpus("shared/new", False), tmp_path / "shared" / "cache"
    access = os.access

    def can_access(path: str | Path, mode: int) -> bool:
        return tmp_path / "shared" not in (Path(path), *Path(path).parents) and access(path, mode)

    monkeypatch.setattr(os, "access", can_access)

    def assert_rejected() -> None:
        (actual,) = problems("stage1", upcycled, "--data-path", new)
        assert actual.startswith(f"the order of samples cannot be saved beside {new}") and "--data-cache-path" in actual
        (actual,) = problems("stage1", upcycled, "--data-path", new, "--data-cache-path", str(other))
        assert f"in --data-cache-path {other}:" in actual

    assert_rejected()
    accepted("stage1", upcycled, "--data-path", new, "--data-cache-path", str(tmp_path / "mine" / "cache"))
    indices = Path(new) / "cache" / "TaggedGPTDataset_indices"
    for folder in (indices, other):
        folder.mkdir(parents=True)
    assert_rejected()
    for folder in (indices, other):  # perhaps of this run
        (folder / "0123-TaggedGPTDataset-train-shuffle_index.npy").touch()
    accepted("stage1", upcycled, "--data-path", new)
    accepted("stage1", upcycled, "--data-path", new, "--data-cache-path", str(other))


def test_early_stopping_validates_each_saved_step(upcycled, problems, accepted, write_corpus, tmp_path) -> None:
    command = ["stage1", upcycled, "--early-stop-patience", "1M", "--save-interval", "20"]
    assert problems(*command)[0].startswith("--early-stop-patience requires --validation-data")
    command += ["--save", str(tmp_path / "run"), "--validation-data", f"el={write_corpus('el', False)}"]
    assert accepted(*command)["eval_interval"] == 20
    assert accepted(*command, "--eval-interval", "40")["eval_interval"] == 40
    assert "--eval-interval must be a multiple of --save-interval 20" in problems(*command, "--eval-interval", "30")[0]
    (actual,) = problems(*command, "--save-interval", "0")
    assert actual.startswith("--save-interval must be at least 1, got 0")
