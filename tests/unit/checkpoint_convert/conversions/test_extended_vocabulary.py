import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, NewTokens
from tests.support.hf_models import (
    TOKENS,
    assert_import_fails,
    edit_json,
    load_stock,
    our_logits,
    save_extended_tokenizer,
    tensors_of,
)

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
OLD_TEXT = TOKENS % 60  # the tests' tokenizer has 60 IDs, and its models 99 rows


def extend_tokenizer(model: Path, folder: Path) -> Path:
    """45 new tokens, runs of b: 39 take the spare rows, and 6 are added."""
    return save_extended_tokenizer(model, folder, [("b", "b" * n) for n in range(1, 46)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_means_and_old_rows_keep_their_bits(make_qwen2, tmp_path, tied, dtype) -> None:
    model = make_qwen2(torch.bfloat16, tokenizer=True, tie_word_embeddings=tied)
    extended = extend_tokenizer(model, tmp_path / "extended")
    replaces = [[(7 * n + k) % 60 for k in range(2 + n % 4)] for n in range(45)]
    change_record(extended, replaces=replaces)
    spec = hf_to_mcore(model, tmp_path / "out", NewExperts(4), dtype=dtype, extended_tokenizer=extended)
    assert spec.new_tokens == NewTokens(first=60, number=45, base_vocab_size=99)
    assert ModelSpec.read(tmp_path / "out") == spec and spec.megatron_args["vocab_size"] == 105
    before, after = tensors_of(model), MegatronReader(tmp_path / "out")
    for name in (EMBEDDING,) if tied else (EMBEDDING, OUTPUT):
        rows, old = after.read(name), before[name].to(getattr(torch, dtype))
        assert rows.shape == (105, 32)
        assert torch.equal(rows[:60], old[:60])
        for new, replaced in enumerate(replaces, start=60):
            mean = torch.stack([before[name][id].float() for id in replaced]).sum(dim=0) / len(replaced)
            torch.testing.assert_close(rows[new].float(), mean, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-7)


@pytest.mark.parametrize("experts", [None, NewExperts(4)], ids=["dense", "upcycled"])
@pytest.mark.parametrize("tied", [False, True])
def test_text_without_new_tokens_gets_the_same_logits_bit_for_bit(make_qwen2, tmp_path, tied, experts) -> None:
    model = make_qwen2(tokenizer=True, tie_word_embeddings=tied)
    extended = extend_tokenizer(model, tmp_path / "extended")
    hf_to_mcore(model, tmp_path / "old", experts)
    hf_to_mcore(model, tmp_path / "grown", experts, extended_tokenizer=extended)
    old, grown = our_logits(tmp_path / "old", OLD_TEXT), our_logits(tmp_path / "grown", OLD_TEXT)
    assert torch.equal(grown[..., :60], old[..., :60])
    if experts is None:
        mcore_to_hf(tmp_path / "grown", tmp_path / "hf")
        with torch.no_grad():
            before, after = (load_stock(folder)(OLD_TEXT).logits for folder in (model, tmp_path / "hf"))
        assert torch.equal(after[..., :60], before[..., :60])


def change_record(extended: Path, **changes) -> None:
    replace(VocabularyExtension.read(extended), **changes).write(extended)


def change_old_ids(extended: Path) -> None:
    model = json.loads((extended / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {"aa": model["vocab"]["aaa"], "aaa": model["vocab"]["aa"]}
    edit_json(extended / "tokenizer.json", model=model | {"vocab": vocab})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(change_record, old_fingerprint="huggingface:0"), "moelpr data extend-tokenizer --tokenizer"),
        (partial(change_record, replaces=[[1]] * 44), " 60 to 103"),
        (change_old_ids, "old tokens other IDs"),
        (lambda folder: (folder / "vocabulary_extension.json").unlink(), "vocabulary_extension.json"),
    ],
)
def test_a_tokenizer_that_does_not_extend_the_models_is_rejected(qwen2, tmp_path, change, message) -> None:
    change(extended := extend_tokenizer(qwen2, tmp_path / "extended"))
    assert_import_fails(qwen2, tmp_path, message, extended_tokenizer=extended)
