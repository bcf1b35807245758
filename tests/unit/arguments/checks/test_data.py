"""Corpora are there, the model knows their tokens, and flags for data do what they say."""

import argparse
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moelpr.arguments.checks import data as checks
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, TokenizerRecord, manifest_path
from moelpr.data.tokenizer import load_tokenizer

APART = "--dataloader-inter-document-masking"


def test_every_corpus_that_is_not_there_is_named(upcycled: str, refused, tmp_path: Path) -> None:
    there = tmp_path / "corpus"
    said = refused("stage1", upcycled, "--data-path", "0.5", "nowhere", "0.3", str(there), "0.2", "elsewhere")
    assert said == [
        f"{prefix}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
        for prefix in ("nowhere", "elsewhere")
    ]


def test_data_that_is_named_twice_or_unreadable_is_refused(upcycled: str, refused, tmp_path: Path) -> None:
    said = refused("stage1", upcycled, "--train-data-path", str(tmp_path / "corpus"))
    assert said == ["--data-path and --train-data-path both name the training data; keep one of them"]
    (said,) = refused("stage1", upcycled, "--data-args-path", "nowhere.txt", with_data=False)
    assert said.startswith("the training data can't be read from the flags ([Errno 2]")


def test_weights_may_be_tokens(upcycled: str, accepted, data: list[str], tmp_path: Path) -> None:
    from moelpr.data.dataset import dataset_config

    args = accepted("stage1", upcycled, "--data-path", "8e9", data[1], "4e9", data[1])
    assert dataset_config(argparse.Namespace(**args)).blend == ([data[1], data[1]], [8e9, 4e9])


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_corpus_has_a_share(upcycled: str, refused, data: list[str], weight: str) -> None:
    assert refused("stage1", upcycled, "--data-path", "1", data[1], weight, data[1]) == [
        f"the weight {float(weight):g} of {data[1]} must be above 0; leave the corpus out, or give it a share"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mock-data"], "--mock-data has no language bits; name corpora with --data-path PREFIX"),
        (["--reset-attention-mask"],
         f"--reset-attention-mask has no effect: attention builds its own mask; use {APART}"),
        (["--reset-position-ids"],
         f"--reset-position-ids has no effect: the model's rotary positions are relative; use {APART}"),
        (["--per-dataset-sequences-path", "x"], "--per-dataset-sequences-path has no effect here; drop it"),
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused(upcycled: str, refused, words: list[str], said: str) -> None:
    assert refused("stage1", upcycled, *words) == [said]


def test_documents_are_kept_apart_where_our_attention_runs(
    upcycled: str, accepted, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args

    from moelpr.arguments import machine
    from moelpr.data.dataset import dataset_config
    from moelpr.megatron_patches import cpu
    from moelpr.model.config import MoELPRConfig

    for words, is_on in (([], False), ([APART], True)):
        args = argparse.Namespace(**accepted("stage1", upcycled, *words))
        assert dataset_config(args).inter_document_masking == is_on
        config = core_transformer_config_from_args(args, config_class=MoELPRConfig)
        assert config.dataloader_inter_document_masking == is_on
    monkeypatch.setattr(machine, "is_installed", lambda module: module == "transformer_engine")
    with monkeypatch.context() as gpu:
        gpu.setattr(cpu, "is_needed", lambda: False)
        (said,) = refused("stage1", upcycled, APART)
        (other,) = refused("stage1", upcycled, APART, "--transformer-impl", "local", "--mock-data")
    assert said == (
        f"{APART} works with PyTorch's attention only, not with Transformer Engine's so far; add --transformer-impl "
        "local, or drop it"
    )
    assert other.startswith("--mock-data")


def save_tokenizer(folder: Path, words: list[str]) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_manifest(prefix: str, folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
    Manifest(
        tokenizer=TokenizerRecord.of("HuggingFaceTokenizer", str(folder), tokenizer, None, True),
        append_eod=False,
        sources=[],
        languages={"el": LanguageCount("expanded", 1, 1, 1)},
        documents=1,
        tokens=1,
        skipped_lines=0,
        files={name: FileRecord(1, "0") for name in ("bin", "idx", "lang")},
    ).write(prefix)


def test_a_corpus_of_another_tokenizer_is_refused(
    upcycled: str, data: list[str], refused, accepted, tmp_path: Path, capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prefix, hf = data[1], Path(upcycled) / "hf"
    assert accepted("stage1", upcycled)
    missing = f"{prefix}.manifest.json is missing, so nothing says which tokenizer {prefix} was made with"
    assert missing in capfd.readouterr().err

    write_manifest(prefix, save_tokenizer(tmp_path / "theirs", ["a", "b", "c"]))
    assert accepted("stage1", upcycled)
    assert f"{hf} holds no tokenizer, so that of {prefix} can't be compared" in capfd.readouterr().err

    save_tokenizer(hf, ["a", "c", "b"])
    checks._likeness.cache_clear()
    (said,) = refused("stage1", upcycled, "--seed", "1")
    assert said.startswith(f"{prefix} was made with another tokenizer than the model's, so its ids mean other tokens (")
    assert said.endswith(f"tokenize the text again with --tokenizer-type HuggingFaceTokenizer --tokenizer-model {hf}")
    monkeypatch.setenv("RANK", "1")  # one rank looks
    assert accepted("stage1", upcycled)
    monkeypatch.setenv("RANK", "0")

    write_manifest(prefix, hf)
    assert accepted("stage1", upcycled)
    assert "tokenizer" not in capfd.readouterr().err

    manifest_path(prefix).write_text("{}")
    (said,) = refused("stage1", upcycled)
    assert said.startswith(f"{prefix}.manifest.json has format version None")
