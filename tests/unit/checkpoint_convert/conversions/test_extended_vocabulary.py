"""Conversion with an extended tokenizer: rows of new tokens are means, and everything else computes the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, NewTokens
from tests.support.hf_models import (
    TOKENS,
    assert_import_fails,
    files_of,
    load_stock,
    our_logits,
    save_extended_tokenizer,
    save_tokenizer,
    tensors_of,
)

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
OLD_TEXT = TOKENS % 60  # the tests' tokenizer has 60 IDs, and its models 99 rows


def extend_tokenizer(model: Path, folder: Path, number: int, first: int = 2) -> Path:
    """New tokens are runs of b, the first of which has the length `first`."""
    return save_extended_tokenizer(model, folder, [("b", "b" * n) for n in range(first - 1, first - 1 + number)])


@pytest.fixture
def extended(qwen2: Path, tmp_path: Path) -> Path:
    """45 new tokens: 39 take the spare rows, and 6 are added."""
    return extend_tokenizer(qwen2, tmp_path / "extended", 45)


def varied(extended: Path, vocab: int = 60) -> VocabularyExtension:
    """An extension whose new tokens replace different old ones."""
    extension = VocabularyExtension.read(extended)
    replaces = [[(7 * n + k) % vocab for k in range(2 + n % 4)] for n in range(extension.number)]
    extension = replace(extension, replaces=replaces)
    extension.write(extended)
    return extension


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_means_and_old_rows_keep_their_bits(make_qwen2, tmp_path, tied, dtype) -> None:
    model = make_qwen2(torch.bfloat16, tokenizer=True, tie_word_embeddings=tied)
    extension = varied(extend_tokenizer(model, tmp_path / "extended", 45))
    spec = hf_to_mcore(model, tmp_path / "out", NewExperts(4), dtype=dtype, extended_tokenizer=tmp_path / "extended")
    assert spec.new_tokens == NewTokens(first=60, number=45, base_vocab_size=99)
    assert ModelSpec.read(tmp_path / "out") == spec and spec.megatron_args["vocab_size"] == 105
    before, after = tensors_of(model), MegatronReader(tmp_path / "out")
    for name in (EMBEDDING,) if tied else (EMBEDDING, OUTPUT):
        rows, old = after.read(name), before[name].to(getattr(torch, dtype))
        assert rows.shape == (105, 32)
        assert torch.equal(rows[:60], old[:60])
        for new, replaced in enumerate(extension.replaces, start=60):
            mean = torch.stack([before[name][id].float() for id in replaced]).sum(dim=0) / len(replaced)
            torch.testing.assert_close(rows[new].float(), mean, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-7)


def test_new_tokens_that_fit_into_spare_rows_add_none(qwen2: Path, tmp_path: Path) -> None:
    extended = extend_tokenizer(qwen2, tmp_path / "extended", 10)
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    before, after = tensors_of(qwen2)[EMBEDDING], MegatronReader(tmp_path / "out").read(EMBEDDING)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert after.shape == before.shape and changed == list(range(60, 70))


@pytest.mark.parametrize("experts", [None, NewExperts(4)], ids=["dense", "upcycled"])
@pytest.mark.parametrize("tied", [False, True])
def test_text_without_new_tokens_gets_the_same_logits_bit_for_bit(make_qwen2, tmp_path, tied, experts) -> None:
    model = make_qwen2(tokenizer=True, tie_word_embeddings=tied)
    extended = extend_tokenizer(model, tmp_path / "extended", 45)
    hf_to_mcore(model, tmp_path / "old", experts)
    hf_to_mcore(model, tmp_path / "grown", experts, extended_tokenizer=extended)
    old, grown = our_logits(tmp_path / "old", OLD_TEXT), our_logits(tmp_path / "grown", OLD_TEXT)
    assert torch.equal(grown[..., :60], old[..., :60])
    if experts is None:
        mcore_to_hf(tmp_path / "grown", tmp_path / "hf")
        with torch.no_grad():
            before, after = (load_stock(folder)(OLD_TEXT).logits for folder in (model, tmp_path / "hf"))
        assert torch.equal(after[..., :60], before[..., :60])


def test_the_checkpoint_and_its_export_have_the_extended_tokenizer(qwen2: Path, extended: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    mcore_to_hf(tmp_path / "out", tmp_path / "export")
    for folder in (tmp_path / "out" / "hf", tmp_path / "export"):
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 105
        found, given = files_of(folder), files_of(extended)
        assert {name: found[name] for name in given} == given
        assert AutoTokenizer.from_pretrained(folder)("abb")["input_ids"] == [1, 60]


def test_a_model_keeps_its_chat_template_if_the_extended_tokenizer_has_none(qwen2, extended, tmp_path) -> None:
    (extended / "chat_template.jinja").unlink()
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    assert (tmp_path / "out/hf/chat_template.jinja").read_text() == (qwen2 / "chat_template.jinja").read_text()


def test_in_the_next_round_the_tokens_of_the_last_one_are_old(qwen2: Path, extended: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "first", NewExperts(2), extended_tokenizer=extended)
    mcore_to_hf(tmp_path / "first", tmp_path / "export")
    spec = hf_to_mcore(tmp_path / "export", tmp_path / "second", NewExperts(2))
    assert spec.new_tokens is None and spec.megatron_args["vocab_size"] == 105
    rows = [MegatronReader(tmp_path / name).read(EMBEDDING) for name in ("first", "second")]
    assert torch.equal(*rows)
    again = extend_tokenizer(tmp_path / "export", tmp_path / "again", 1, first=47)
    spec = hf_to_mcore(tmp_path / "export", tmp_path / "third", NewExperts(2), extended_tokenizer=again)
    assert spec.new_tokens == NewTokens(first=105, number=1, base_vocab_size=105)
    b, last = rows[0][2], rows[0][104]
    torch.testing.assert_close(MegatronReader(tmp_path / "third").read(EMBEDDING)[105], (b + last) / 2)


def test_an_interrupted_conversion_does_not_resume_with_another_extension(qwen2, extended, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("checkpoint_convert.conversions.upcycled_checkpoint.copy_companions", interrupt)
        hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    extension = varied(extended)
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    rows = MegatronReader(tmp_path / "out").read(EMBEDDING)
    torch.testing.assert_close(rows[60], rows[extension.replaces[0]].mean(dim=0))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def other_fingerprint(extended: Path) -> None:
    replace(VocabularyExtension.read(extended), old_fingerprint="huggingface:0").write(extended)


def fewer_new_ids(extended: Path) -> None:
    extension = VocabularyExtension.read(extended)
    replace(extension, replaces=extension.replaces[:-1]).write(extended)


def other_old_ids(extended: Path) -> None:
    path = extended / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["aa"], vocab["aaa"] = vocab["aaa"], vocab["aa"]
    path.write_text(json.dumps(content))


def no_record(extended: Path) -> None:
    (extended / "vocabulary_extension.json").unlink()


def no_tokenizer(extended: Path) -> None:
    (extended / "tokenizer.json").unlink()
    (extended / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_fingerprint, "extends another tokenizer than that of .*moelpr data extend-tokenizer --tokenizer"),
        (fewer_new_ids, "does not have the new IDs .* 60 to 103"),
        (other_old_ids, "gives old tokens other IDs"),
        (no_record, "has no vocabulary_extension.json; pass a folder that moelpr data extend-tokenizer wrote"),
        (no_tokenizer, "the tokenizer in .*extended cannot be opened"),
    ],
)
def test_a_tokenizer_that_does_not_extend_the_models_is_rejected(qwen2, extended, tmp_path, change, message) -> None:
    change(extended)
    assert_import_fails(qwen2, tmp_path, message, extended_tokenizer=extended)


def test_an_extension_is_of_one_model_only(qwen2: Path, extended: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(qwen2, tmp_path / "other"))
    save_tokenizer(other, 61)
    assert_import_fails(other, tmp_path, "extends another tokenizer", extended_tokenizer=extended)


def test_of_the_model_one_matrix_is_in_memory(qwen2: Path, extended: Path, tmp_path: Path, held_bytes) -> None:
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(4), extended_tokenizer=extended)
    assert held_bytes.take_peak() <= 99 * 32 * 4
