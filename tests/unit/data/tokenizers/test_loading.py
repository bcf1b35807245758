"""A fingerprint does not depend on what does not affect IDs (on what does: test_tokenizer_match.py)."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from moelpr.base.errors import UserError
from moelpr.data.tokenizers.loading import load_tokenizer, open_hf_tokenizer
from tests.support.small_tokenizers import byte_level_bpe

LIGHT = ["turn on the light"] * 5


def fingerprint(folder: Path) -> str:
    return load_tokenizer("HuggingFaceTokenizer", str(folder)).fingerprint()


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_saving_and_loading_again_keeps_the_fingerprint(save_hf, kind: str, tmp_path: Path) -> None:
    """transformers rewrites tokenizer.json for some classes, so the files may differ although the tokenizers do not."""
    first = save_hf(tmp_path / "first", byte_level_bpe(LIGHT), kind)
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "second")
    AutoTokenizer.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    assert fingerprint(first) == fingerprint(tmp_path / "second") == fingerprint(tmp_path / "third")


def test_settings_that_do_not_affect_ids_do_not_change_the_fingerprint(save_hf, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe(LIGHT)
    first = save_hf(tmp_path / "first", tokenizer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=1, pad_token="</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    second = save_hf(tmp_path / "second", tokenizer, chat_template="{{ messages }}", padding_side="left")
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_tokenizer_that_cannot_be_loaded_is_reported(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer folder .*missing|--tokenizer-model must be"):
        load_tokenizer(kind, str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_an_id_of_a_billion_is_reported_at_once(save_hf, name: str, tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "hf", byte_level_bpe(LIGHT))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 10**9
    if name == "vocab.json":
        (folder / "tokenizer.json").unlink()
        content = content["model"]["vocab"]
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}: .*\ba should be less than 10000000, got 1000000000"):
        load_tokenizer("HuggingFaceTokenizer", str(folder))


def test_a_hub_name_is_answered_with_the_command_that_downloads_it(tmp_path: Path) -> None:
    for model, has_hint in (("nobody/nothing", True), (str(tmp_path), False)):
        with pytest.raises(UserError) as error:
            load_tokenizer("HuggingFaceTokenizer", model)
        assert ("run hf download NAME --local-dir DIR first" in str(error.value)) == has_hint


def test_a_largest_length_that_is_no_number_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": "512"}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: model_max_length"):
        open_hf_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_express_a_text_is_loaded(tmp_path: Path) -> None:
    """The check for lost text must not fail on it."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="missing")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert load_tokenizer("HuggingFaceTokenizer", str(tmp_path)).vocabulary() == {"a": 0, "b": 1}


class PanicException(BaseException):
    """As those of pyo3, which are no `Exception`."""


def test_the_trace_of_a_panic_is_hidden_from_stderr_unless_other_threads_write_there(
    save_hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_hf(tmp_path / "hf", byte_level_bpe(LIGHT))

    def open_one(error: BaseException | None) -> None:
        def opened(*_: object, **__: object) -> None:
            os.write(2, b"printed")
            if error is not None:
                raise error

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", opened)
        with pytest.raises(UserError) if error else nullcontext():
            open_hf_tokenizer(folder)

    for error, shown in ((None, "printed"), (PanicException("out of bounds"), "")):
        open_one(error)
        assert capfd.readouterr().err == shown
    with ThreadPoolExecutor(1) as pool:
        pool.submit(open_one, PanicException("out of bounds")).result()
    assert capfd.readouterr().err == "printed"
