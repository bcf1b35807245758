"""Exports, comparisons and grafts of a model with an extended vocabulary."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from checkpoint_convert.compare.logits import compare_on_text
from checkpoint_convert.compare.tensors import compare_frozen, compare_graft
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.graft import main as graft_main
from checkpoint_convert.hf.vocabulary_rows import new_rows
from checkpoint_convert.verify import main as verify_main
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE, VocabularyExtension
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import copy_of, edit_json, edit_tensors, load_stock, save_extended_tokenizer, tensors_of
from tests.unit.checkpoint_convert.conftest import instruct_of

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def extend(base: Path, folder: Path, num_new: int = 45) -> Path:
    """A tokenizer whose new tokens have different rows; the model has 99 rows, of which the old tokens use 60."""
    save_extended_tokenizer(base, folder, [("b", "b" * n) for n in range(1, num_new + 1)])
    extension = VocabularyExtension.read(folder)
    replaces = [[1 + n % 59, 1 + n // 7] for n in range(num_new)]
    replace(extension, replaces=replaces).write(folder)
    return folder


def grown(base: Path, folder: Path, num_new: int = 45, **options) -> Path:
    """A checkpoint of `base` with 2 new experts and new tokens, as if trained."""
    extended = extend(base, folder / "extended", num_new)
    hf_to_mcore(
        base, folder / "megatron", NewExperts(2), start=Start(noise=0.5), extended_tokenizer=extended, **options
    )
    return folder / "megatron"


@pytest.fixture
def model(qwen2: Path, tmp_path: Path) -> Path:
    """Its export, which a test may change."""
    mcore_to_hf(grown(qwen2, tmp_path), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("as_class", [None, "granitemoe", "mixtral"])
def test_every_class_is_exported_with_the_rows_and_the_tokenizer(make_model, tmp_path, as_class) -> None:
    base = make_model("LlamaForCausalLM" if as_class == "mixtral" else "Qwen2ForCausalLM", tokenizer=True)
    mcore_to_hf(grown(base, tmp_path), tmp_path / "model", as_class=as_class)
    loaded, tokenizer = load_stock(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config.vocab_size == len(tokenizer) == loaded.get_input_embeddings().weight.shape[0] == 105
    assert tokenizer("abb")["input_ids"] == [1, 60]
    assert VocabularyExtension.read(tmp_path / "model").number == 45
    card = (tmp_path / "model/README.md").read_text()
    assert "extended by 45 tokens (IDs 60 to 104), each in place of 2.0 of the base's on average" in card


def test_old_and_unused_rows_are_compared_and_new_ones_ignored(qwen2: Path, tmp_path: Path, exit_code, capsys) -> None:
    mcore_to_hf(grown(qwen2, tmp_path, num_new=10), tmp_path / "model")
    for rows, code in (([], 0), ([60, 69], 0), ([59], 1), ([70], 1)):
        model = copy_of(tmp_path / "model", lambda tensors, rows=rows: [tensors[OUTPUT][row].add_(1) for row in rows])
        assert exit_code(verify_main, "--frozen", qwen2, model) == code
        out = capsys.readouterr().out
        assert "ignored: the rows of 10 new tokens" in out
        assert (OUTPUT in out) == bool(code)
    assert exit_code(verify_main, "--frozen", qwen2, tmp_path / "model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_ignored_rows"] == 10
    for a, b in ((tmp_path / "megatron", qwen2), (qwen2, tmp_path / "megatron")):
        assert new_rows(a, b) == (range(60, 70) if a == qwen2 else range(0))
    assert all(not verdict.differs(0) for verdict in compare_frozen(qwen2, tmp_path / "megatron"))


def test_text_without_new_tokens_gets_the_base_logits_and_other_text_a_sentence(
    qwen2: Path, tmp_path: Path, text: Path, exit_code, capsys, megatron: None
) -> None:
    extended, old_text = extend(qwen2, tmp_path / "extended"), tmp_path / "old.jsonl"
    old_text.write_text(json.dumps({"text": "abaaab" * 40}))  # without bb, the shortest new token
    # Untrained, so it computes what qwen2 does.
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(2), extended_tokenizer=extended)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "model")
    frozen = ("--frozen", qwen2, tmp_path / "model", "--text")
    assert exit_code(verify_main, *frozen, old_text) == 0
    assert "100.00%" in capsys.readouterr().out
    (verdict,) = compare_on_text(tmp_path / "megatron", qwen2, [old_text], sequence_length=32)
    assert verdict.num_tokens == verdict.num_same_choice > 64
    assert exit_code(verify_main, *frozen, text) == 2
    assert "pass text of the original languages, which has no new tokens" in capsys.readouterr().err
    # Two models with the same new tokens are compared on any text, in all logits.
    pair = tmp_path / "megatron", tmp_path / "model"
    (verdict,) = compare_on_text(*pair, [text], sequence_length=32)
    assert verdict.max_abs_logit_diff < 1e-4
    edit_tensors(tmp_path / "model", lambda tensors: tensors[OUTPUT][104].add_(1))
    (verdict,) = compare_on_text(*pair, [text], sequence_length=32)
    assert verdict.max_abs_logit_diff > 1e-4
    assert exit_code(verify_main, *frozen, old_text) == 0  # the logit of a new token


def test_a_second_round_takes_the_new_tokens_as_old(qwen2: Path, model: Path, tmp_path: Path) -> None:
    """Without and with a further extension; compared with the export of round 1, and with the base of both rounds."""
    hf_to_mcore(model, tmp_path / "second", NewExperts(2), start=Start(noise=0.5))
    mcore_to_hf(tmp_path / "second", tmp_path / "model2")
    third = save_extended_tokenizer(model, tmp_path / "third", [("b", "a")])
    hf_to_mcore(model, tmp_path / "megatron3", NewExperts(2), start=Start(noise=0.5), extended_tokenizer=third)
    mcore_to_hf(tmp_path / "megatron3", tmp_path / "model3")
    for later, since_model, since_base in (
        (tmp_path / "model2", range(0), range(60, 105)),
        (tmp_path / "model3", range(105, 106), range(60, 106)),
    ):
        for earlier, rows in ((model, since_model), (qwen2, since_base)):
            assert list(new_rows(earlier, later)) == list(rows)
            assert all(not verdict.differs(0) for verdict in compare_frozen(earlier, later))
        assert torch.equal(tensors_of(later)[EMBEDDING][:105], tensors_of(model)[EMBEDDING])


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_graft_keeps_new_rows_and_gives_old_rows_the_difference(qwen2, model, tmp_path, exit_code, scale) -> None:
    """The instruct model has the old vocabulary, and starts with a token as the model does not."""
    edit_tensors(model, lambda tensors: [tensors[name][60:].mul_(3) for name in (EMBEDDING, OUTPUT)])  # trained
    instruct = instruct_of(qwen2, tmp_path / "instruct")
    edit_json(instruct / "tokenizer_config.json", bos_token="<|endoftext|>")
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    given = ("--base", qwen2, "--instruct", instruct, "--model", model)
    assert exit_code(graft_main, *given, "--save", tmp_path / "out", "--scale", scale) == 0
    of_base, of_instruct, of_model, actual = map(tensors_of, (qwen2, instruct, model, tmp_path / "out"))
    for name in (EMBEDDING, OUTPUT):
        assert torch.equal(actual[name][60:], of_model[name][60:])
        expected = of_model[name][:60] + scale * (of_instruct[name] - of_base[name])[:60]
        torch.testing.assert_close(actual[name][:60], expected)
        assert not torch.equal(actual[name][:60], of_model[name][:60])
    verdicts = list(compare_graft(qwen2, instruct, model, tmp_path / "out"))
    assert verdicts and not any(verdict.differs(0) for verdict in verdicts)

    tokenizer, load = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer
    assert tokenizer.bos_token == "<|endoftext|>" and AutoTokenizer.from_pretrained(model).bos_token is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "ab"
    old, new = (load("HuggingFaceTokenizer", str(folder)) for folder in (model, tmp_path / "out"))
    assert new.vocabulary() == old.vocabulary()
    assert new.encode_whole("abbb ba") == old.encode_whole("abbb ba")
    for name in ("tokenizer.json", VOCABULARY_EXTENSION_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    # transformers 5 would write TokenizersBackend, which transformers 4 does not know.
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "the 45 new tokens, which it lacks, are as in `model`" in (tmp_path / "out/README.md").read_text()
