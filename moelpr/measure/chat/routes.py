"""The experts that each token of a prompt and its answer passes, with their gate weights, as the answer is written."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moelpr.base.chat_templates import rendered_apart
from moelpr.base.errors import reports_panics
from moelpr.measure.evaluate.models import LoadedModel

Route = list[list[tuple[int, float]]]  # MoE layer → its K experts, the heaviest first, with their gate weights


@dataclass(frozen=True)
class Token:
    """A token with its route, which is empty in a dense model."""

    text: str  # addition to the text; empty if the character is complete only with a later token
    route: Route


def original_share(route: Route, num_original: int) -> list[float]:
    """The gate weight of the original experts, the first `num_original`, per layer."""
    return [sum(weight for expert, weight in layer if expert < num_original) for layer in route]


@torch.inference_mode()
def answer(
    loaded: LoadedModel, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0
) -> Iterator[list[Token]]:
    """Yield the tokens of the prompt, then one after another those of the answer, up to the end of the turn.

    Args:
        temperature: 0 takes the most likely token each time.
    """
    from transformers import DynamicCache

    new, cache, texts = [*prompt], DynamicCache(config=loaded.model.config), TokenTexts(loaded.tokenizer)
    for _ in range(max_new_tokens + 1):
        logits_V, routes = _step(loaded, new, cache)
        yield [Token(texts.add(id), route) for id, route in zip(new, routes, strict=True)]
        chosen = logits_V.argmax() if temperature == 0 else (logits_V / temperature).softmax(dim=-1).multinomial(1)
        if int(chosen) in end_ids(loaded):
            return
        new = [int(chosen)]


def _step(loaded: LoadedModel, new: list[int], cache: Any) -> tuple[Tensor, list[Route]]:
    """Logits [V] after the last of the new tokens, which the cache then has, and a route for each of them."""
    choices: dict[int, tuple[list[list[float]], list[list[int]]]] = {}

    def note(number: int, router: nn.Module, inputs: Any, output: Any) -> None:
        chosen_TK, experts_TK = loaded.router_logits(router, inputs, output).float().topk(loaded.topk, dim=-1)
        # Gate weights are a softmax over the K highest logits in all classes of our exports.
        choices[number] = chosen_TK.softmax(dim=-1).tolist(), experts_TK.tolist()

    with ExitStack() as hooks:
        for number, router in loaded.routers.items():
            hooks.callback(router.register_forward_hook(partial(note, number)).remove)
        # transformers 5 renames the argument.
        name = "cache" if "cache" in signature(loaded.model.forward).parameters else "past_key_values"
        tokens = torch.tensor([new], device=loaded.device)
        output = loaded.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{name: cache})
    layers = [choices[number] for number in sorted(choices)]
    routes: list[Route] = [
        [[*zip(experts[place], weights[place], strict=True)] for weights, experts in layers]
        for place in range(len(new))
    ]
    return output.logits[0, -1].float(), routes


def end_ids(loaded: LoadedModel) -> set[int]:
    """The tokens that end an answer."""
    ids = getattr(loaded.model.generation_config, "eos_token_id", None)
    return {id for id in [*(ids if isinstance(ids, list) else [ids]), loaded.eos_id] if id is not None}


class TokenTexts:
    """The text of tokens, one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Some tokenizers drop the space of a first token, so the last one of the text before stays.
        self._before: list[int] = []
        self._incomplete: list[int] = []

    def add(self, id: int) -> str:
        """The text of the next token; empty if its character is complete only with a later one."""
        before = self.tokenizer.decode(self._before)
        self._incomplete.append(id)
        text = str(self.tokenizer.decode(self._before + self._incomplete)[len(before) :])
        if text.endswith("\ufffd"):
            return ""
        self._before, self._incomplete = [id], []
        return text


def prompt_ids(loaded: LoadedModel, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the chat template writes it; without a template, the last message after the start token.

    Raises:
        UserError: The template refuses the conversation, or takes too much time or memory.
    """
    tokenizer, start, text = loaded.tokenizer, [loaded.start_id], messages[-1]["content"]
    if getattr(tokenizer, "chat_template", None):
        start, text = [], rendered_apart(tokenizer.get_chat_template(), messages, tokenizer.special_tokens_map)
    with reports_panics():
        return [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
