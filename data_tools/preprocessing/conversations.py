"""Conversations become text by a tokenizer's chat template, with the assistant's turns marked in it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.job_tokenizer import omit_torch
from moelpr.base.chat_templates import renders_template
from moelpr.base.errors import UserError, first_line, reports_panics
from moelpr.data.text.documents import BadLine, json_type
from moelpr.data.tokenizers.base import Tokenizer, sha256_of
from moelpr.data.tokenizers.loading import open_hf_tokenizer

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers recognizes it
_KEYS = ("role", "content")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    # start and end of what the assistant wrote, in characters: with marks of the template what they enclose, otherwise
    # all that it adds to the prompt, such as "yes<|im_end|>\n"
    turns: list[tuple[int, int]]
    contents: str  # the messages without the template


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, which transformers renders."""

    source: str  # its file, or the folder of the tokenizer that has it
    template: str
    special_tokens: dict[str, Any]  # names of special tokens, such as bos_token, and the tokens
    added_tokens: dict[str, int]  # the tokens added to that tokenizer that the template contains, and their IDs

    @property
    def fingerprint(self) -> str:
        return sha256_of([self.template, self.special_tokens])

    def check_tokens(self, tokenizer: Tokenizer, model: str) -> None:
        """Raise `UserError` unless the template's tokens are single tokens of the tokenizer, with the same IDs."""
        vocabulary = tokenizer.vocabulary()
        for token, id in self.added_tokens.items():
            if vocabulary.get(token) != id or token not in tokenizer.added_tokens:
                raise UserError(
                    f"the chat template of {self.source} contains {token}, which is not the same token in {model}; "
                    "pass the template of a model with this tokenizer"
                )

    def render(self, document: dict[str, Any], key: str) -> Rendered:
        """Render the messages under a key.

        Raises:
            BadLine: They are no conversation, the template refuses them, or nothing in them is the assistant's.
        """
        messages = _messages(document, key)
        if not any(message["role"] == "assistant" for message in messages):
            raise BadLine("the conversation has no assistant turn")
        contents = "\n".join(message["content"] for message in messages)
        if _MARKS_TURNS.search(self.template):
            text, turns = self._rendered(messages, marks_turns=True)
            if not turns:
                raise BadLine("the chat template marks no assistant turn in the conversation")
            return Rendered(text, turns, contents)
        text, turns = self._rendered(messages)[0], []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._rendered(messages[:number], add_generation_prompt=True)[0]
                through = self._rendered(messages[: number + 1])[0]
                if not through.startswith(before) or not text.startswith(through):
                    raise BadLine(
                        f"the chat template of {self.source} has no {{% generation %}} blocks and renders message "
                        f"{number + 1} not as the continuation of its prompt, so the assistant's tokens are unknown; "
                        "pass a template with them (docs/chat.md)"
                    )
                turns.append((len(before), len(through)))
        return Rendered(text, turns, contents)

    def _rendered(self, messages: list[dict[str, str]], marks_turns: bool = False, **options: bool) -> tuple[str, list]:
        omit_torch()
        from transformers.utils.chat_template_utils import render_jinja_template

        with renders_template(BadLine):
            texts, turns = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=marks_turns,
                **options,
                **self.special_tokens,
            )
        return texts[0], turns[0] if marks_turns else []


def counted_tokens(starts: NDArray[np.int64], turns: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """Return which tokens are the assistant's, those that overlap its turns: uint8 [tokens].

    Args:
        starts: The character that each token starts in [tokens].
        turns: Start and end of the turns, in characters.
    """
    is_counted = np.zeros(len(starts), np.uint8)
    for start, end in turns:
        first = starts[starts <= start].max(initial=0)
        is_counted |= (starts >= first) & (starts < end) & (end > start)
    is_counted[:1] = 0  # nothing predicts it
    return is_counted


@reports_panics()
def load_chat_template(source: str, model: str) -> ChatTemplate:
    """Load a chat template.

    Args:
        source: The folder of a tokenizer that has it, or a file with the template, for the tokenizer in `model`.

    Raises:
        UserError: The tokenizer can't be loaded, or has no chat template.
    """
    omit_torch()
    is_file = os.path.isfile(source)
    tokenizer = open_hf_tokenizer(model if is_file else source)
    try:
        template = Path(source).read_text("utf-8") if is_file else tokenizer.get_chat_template()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{source} has no chat template ({first_line(error)}); pass --chat-template-from with the folder of a chat "
            "model, or a file with the template"
        ) from error
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content in template}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(source, template, special, added)


def _messages(document: dict[str, Any], key: str) -> list[dict[str, str]]:
    """The messages under a key, with role and content only; `BadLine` if there is anything else."""
    if key not in document:
        raise BadLine(f'the key "{key}" is missing')
    turns, messages = document[key], []
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if isinstance(turns, list) else json_type(turns)
        raise BadLine(f'the key "{key}" contains {what}, not a list of messages')
    for number, message in enumerate(turns, 1):
        if not isinstance(message, dict):
            raise BadLine(f'message {number} is {json_type(message)}, not an object with "role" and "content"')
        for name in _KEYS:
            if not isinstance(message.get(name), str):
                what = json_type(message[name]) if name in message else "missing"
                raise BadLine(f'the "{name}" of message {number} is {what}, not a string; only text is supported')
        if others := [name for name, value in message.items() if name not in _KEYS and value]:
            raise BadLine(f'message {number} has "{others[0]}"; only "role" and "content" are supported, no tool calls')
        messages.append({name: message[name] for name in _KEYS})
    return messages
