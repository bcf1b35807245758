from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from moelpr.base import chat_templates
from moelpr.measure.chat.drawing import colour, panel, routes_panel
from moelpr.measure.chat.page import Chat
from moelpr.measure.chat.routes import Token, TokenTexts, answer, original_share, prompt_ids
from moelpr.measure.evaluate.models import LoadedModel, load_model
from moelpr.model.families.new_experts import NewExperts
from tests.support.chat_templates import CHATML
from tests.support.hf_models import make_model, write_export  # noqa: F401

# Classes of exports, and the name of the router in a layer.
CLASSES = {"mixtral": "LlamaForCausalLM", "qwen3_moe": "Qwen3ForCausalLM", "granitemoe": "Qwen2ForCausalLM"}
PROMPT = [3, 17, 4, 1, 9]


@pytest.fixture(scope="module", params=CLASSES)
def export(request, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two copies of the original expert and two new ones, which differ."""
    folder = tmp_path_factory.mktemp("chat")
    dense = make_model(CLASSES[request.param], tokenizer=True)
    return write_export(dense, folder, NewExperts(2, original_copies=2), noise=0.5, as_class=request.param)


@pytest.fixture(scope="module")
def loaded(export: Path) -> LoadedModel:
    return load_model(export, "cpu")


def test_routes_agree_with_transformers_router_logits(loaded: LoadedModel) -> None:
    prompt = next(answer(loaded, PROMPT, max_new_tokens=1))
    with torch.no_grad():
        logits = loaded.model(torch.tensor([PROMPT]), output_router_logits=True).router_logits
    for number, layer in enumerate(logits):
        layer = layer.reshape(len(PROMPT), -1)
        for place, token in enumerate(prompt):
            assert [expert for expert, _ in token.route[number]] == layer[place].topk(2).indices.tolist()
        share = [original_share(token.route, 2)[number] for token in prompt]
        weights = layer.softmax(-1) * torch.zeros_like(layer).scatter(1, layer.topk(2).indices, 1)
        assert share == pytest.approx((weights[:, :2].sum(1) / weights.sum(1)).tolist(), abs=1e-5)


def test_an_answer_ends_with_its_turn_and_at_most_where_asked(loaded: LoadedModel) -> None:
    _, (first,), *more = answer(loaded, PROMPT, max_new_tokens=3)
    assert first.route and len(more) <= 2
    with mock.patch.object(loaded.model.generation_config, "eos_token_id", [*range(loaded.vocab_size)]):
        assert len([*answer(loaded, PROMPT, max_new_tokens=3)]) == 1


def test_texts_of_tokens_are_the_text_in_pieces() -> None:
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text, texts = "Ναι, 光!", TokenTexts(Bytes())
    pieces = [texts.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert pieces[:3] == ["", "Ν", ""] and len(pieces) == len(text.encode())


def test_a_prompt_is_a_conversation_only_with_a_template(loaded: LoadedModel) -> None:
    messages = [{"role": "user", "content": "aa"}]
    loaded.tokenizer.chat_template = None
    assert prompt_ids(loaded, messages) == [loaded.start_id, *loaded.tokenizer("aa")["input_ids"]]
    loaded.tokenizer.chat_template = CHATML
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt_ids(loaded, messages) == loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ raise_exception('no') }}"],
)
def test_a_template_that_loops_or_refuses_is_said_on_the_page(loaded: LoadedModel, template: str, monkeypatch) -> None:
    monkeypatch.setattr(chat_templates, "_MOST_CPU_S", 0.3)
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    with ThreadPoolExecutor(1) as pool:  # as the page's server asks
        ((answer_panel, routes, histories),) = pool.submit(lambda: [*Chat(loaded, None).ask("a", [[]], 8, 0)]).result()
    assert "the chat template" in answer_panel and routes == "" and histories == [[]]


def test_the_page_shows_shares_as_colours_and_escapes_text() -> None:
    assert (colour(0), colour(0.5), colour(1)) == ("#e2621b", "#e2e2de", "#1f6fbf")
    drawn = routes_panel("Answer", [Token(" <b>", [[(0, 0.7), (3, 0.3)], [(2, 0.6), (3, 0.4)]])], 2, [1, 3])
    assert 'data-original="2" data-layers="1,3"' in drawn and 'data-route="0:0.700,3:0.300;2:0.600,3:0.400"' in drawn
    assert " &lt;b&gt;" in drawn and "<b>" not in drawn
    assert "35% original, 65% new" in drawn and f"{colour(0.7)} 0 50.00%,{colour(0)} 0 100.00%" in drawn
    assert routes_panel("Answer", [], 2, [1]) == "" and "&lt;i&gt;" in panel("Export", "x", "<i>")
