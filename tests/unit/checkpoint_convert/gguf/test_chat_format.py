"""Ollama's templates: what a chat template writes around messages, found from outside."""

import json
import re
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from checkpoint_convert.gguf.chat_format import ChatFormat, Inexpressible, Messages
from checkpoint_convert.gguf.modelfile import modelfile, rendered
from moelpr.base import chat_templates
from tests.support.chat_templates import CHATML_WITH_DEFAULT, CONVERSATIONS, EXPRESSIBLE, NUMBERED
from tests.support.hf_models import make_model, save_tokenizer  # noqa: F401


@pytest.fixture
def tokenizer(tmp_path: Path):
    """It writes BOS before a text, as llama.cpp does, so that Ollama's template must not."""
    save_tokenizer(tmp_path, num_ids=60)
    actual = AutoTokenizer.from_pretrained(tmp_path)
    actual.add_special_tokens({"bos_token": "<|begin|>"})
    special = [("<|begin|>", actual.bos_token_id)]
    actual.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=special)
    return actual


def accepts(template: str, messages: Messages) -> bool:
    return not ("raise_exception" in template and messages[0]["role"] == "system")


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_format_renders_every_conversation_as_jinja_does(tokenizer, name) -> None:
    tokenizer.chat_template = EXPRESSIBLE[name]
    actual = ChatFormat.of(lambda messages, answer: rendered(tokenizer, messages, answer))
    for messages in CONVERSATIONS:
        if accepts(EXPRESSIBLE[name], messages):
            assert actual.render(messages) == rendered(tokenizer, messages, True)


@pytest.mark.parametrize(
    "template",
    [
        NUMBERED,
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for message in messages %}{{ '{{ ' + message.role + message.content + ' }}' }}{% endfor %}",
    ],
)
def test_what_a_go_template_cannot_express_is_refused(tokenizer, template) -> None:
    tokenizer.chat_template = template
    with pytest.raises(Inexpressible):
        ChatFormat.of(lambda messages, answer: rendered(tokenizer, messages, answer)).go_template()


@pytest.mark.parametrize(
    "template", ["{% for i in %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"]
)
def test_a_template_that_fails_or_takes_too_long_gives_no_modelfile(template, make_model, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(chat_templates, "_MOST_CPU_S", 0.3)
    folder = make_model("Qwen2ForCausalLM", tokenizer=True)
    (folder / "chat_template.jinja").write_text(template)
    assert modelfile(folder, "model.gguf")[0] is None


def test_a_modelfile_has_template_stops_and_parameters(make_model, tmp_path) -> None:  # noqa: F811
    folder = make_model("Qwen2ForCausalLM", tokenizer=True)
    (folder / "chat_template.jinja").write_text(CHATML_WITH_DEFAULT)
    settings = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True, "eos_token_id": [0, 3]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    text, note = modelfile(folder, "model-Q4_K_M.gguf")
    assert text is not None and "what the chat template does" in note
    assert text.startswith("FROM ./model-Q4_K_M.gguf\nTEMPLATE ")
    assert "{{ if not .System }}<|im_start|>system\nYou are helpful.<|im_end|>\n{{ end }}" in text
    numbers = ["temperature 0.6", "top_k 20", "repeat_penalty 1.1", "num_ctx 64"]
    stops = ['stop "<|im_end|>"', 'stop "<|endoftext|>"', 'stop "aa"']
    assert re.findall("^PARAMETER (.*)", text, re.MULTILINE) == numbers + stops
    (folder / "chat_template.jinja").write_text(NUMBERED)
    assert modelfile(folder, "model.gguf")[0] is None
    (folder / "chat_template.jinja").unlink()
    assert 'TEMPLATE """{{ .Prompt }}"""' in (modelfile(folder, "model.gguf")[0] or "")
