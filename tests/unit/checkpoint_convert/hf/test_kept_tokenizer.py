import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.grafted_model import graft
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.hub import Model
from moelpr.base.errors import UserError
from moelpr.data.tokenizers.loading import load_tokenizer, open_hf_tokenizer
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import assert_import_fails, edit_json, make_model, write_export  # noqa: F401
from tests.support.small_tokenizers import save_llama2, save_llama3, save_qwen

TEXTS = [" light kitchen", "light 123 4567", "light</s> kitchen<|endoftext|> door<|user|>", "  two\n\n φως\t12"]


def save_llama2_as_on_the_hub(folder: Path) -> None:
    """The Hub's file adds ▁ in the normalizer, which LlamaTokenizer replaces by a pre-tokenizer."""
    save_llama2(folder)
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
    edit_json(folder / "tokenizer.json", normalizer=normalizer, pre_tokenizer=None)


def save_llama2_without_json(folder: Path) -> None:
    save_llama2(folder)
    (folder / "tokenizer.json").unlink()


def save_gpt2_with_digits(folder: Path) -> None:
    """A byte-level BPE that splits numbers into digits, which GPT2Tokenizer does not."""
    save_qwen(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for pair in ("12", "45", "67"):  # digits that stand side by side in a number
        model["vocab"][pair] = len(model["vocab"]) + 20
        model["merges"].append([*pair])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    edit_json(folder / "tokenizer.json", model=model, pre_tokenizer=digits)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=False)


KINDS = {
    "another pre-tokenizer": ("Qwen2ForCausalLM", save_llama3),
    "SentencePiece": ("LlamaForCausalLM", save_llama2_as_on_the_hub),
    "SentencePiece without tokenizer.json": ("LlamaForCausalLM", save_llama2_without_json),
    "digits": ("LlamaForCausalLM", save_gpt2_with_digits),
}


@pytest.fixture
def make_base(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:  # noqa: F811
    def make(architecture: str, save: Callable[[Path], None]) -> Path:
        folder = tmp_path / "base"
        save(folder)
        shutil.copytree(make_model(architecture, vocab_size=600, num_hidden_layers=1), folder, dirs_exist_ok=True)
        return folder

    return make


def facts(folder: Path) -> tuple[object, ...]:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
    ids = [tokenizer.encode_whole(text) for text in TEXTS]
    decoded, padding_side = [tokenizer.decode(text) for text in ids], open_hf_tokenizer(folder).padding_side
    return tokenizer.fingerprint(), ids, tokenizer.eod_id, decoded, padding_side


@pytest.mark.parametrize("kind", KINDS)
def test_exports_tokenize_as_transformers_does_for_the_base(kind: str, make_base, tmp_path: Path) -> None:
    base = make_base(*KINDS[kind])
    write_export(base, tmp_path, NewExperts(1))
    as_copied = Path(shutil.copytree(base, tmp_path / "copied"))
    shutil.copyfile(tmp_path / "hf" / "config.json", as_copied / "config.json")
    assert facts(as_copied) != facts(base)
    assert facts(tmp_path / "hf") == facts(base)

    hf_to_mcore(tmp_path / "hf", tmp_path / "mcore2", NewExperts(1))  # another round
    assert facts(tmp_path / "mcore2" / "hf") == facts(base)
    for as_class in (None, "granitemoe"):
        mcore_to_hf(tmp_path / "mcore2", tmp_path / f"hf-{as_class}", as_class=as_class)
        assert facts(tmp_path / f"hf-{as_class}") == facts(base)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("hf", "hf-None"))
    assert first == second


def test_a_graft_tokenizes_as_its_instruct_model(make_base, tmp_path: Path) -> None:
    base = make_base("LlamaForCausalLM", save_llama2_as_on_the_hub)
    export = write_export(base, tmp_path, NewExperts(1))
    instruct = Path(shutil.copytree(base, tmp_path / "instruct"))
    graft(*(Model(folder, folder.name) for folder in (base, instruct, export)), tmp_path / "graft")  # type: ignore[call-arg]
    assert facts(tmp_path / "graft") == facts(base)


def test_a_tokenizer_that_transformers_makes_lossy_is_refused(make_base, tmp_path: Path) -> None:
    base = make_base("Qwen2ForCausalLM", save_llama2_as_on_the_hub)
    (base / "tokenizer.model").unlink(missing_ok=True)
    edit_json(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert_import_fails(base, tmp_path, "as Qwen2Tokenizer, which loses text")
    with pytest.raises(UserError, match="'twowords'"):  # as preprocessing loads it
        load_tokenizer("HuggingFaceTokenizer", str(base), must_keep_text=True)
