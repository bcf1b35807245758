"""A tiny chat model, and conversations in an original and an expanded language."""

import json
import re
from pathlib import Path
from typing import Any

from tests.support import small_tokenizers

_TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
_REFUSAL = "{{ raise_exception('unknown role ' + m.role) }}"
# ChatML, with what the assistant writes marked as transformers wants it.
MARKED = (
    "{{ bos_token or '' }}{% for m in messages %}"
    f"{{% if m.role not in ['system', 'user', 'assistant'] %}}{_REFUSAL}{{% endif %}}{_TURN}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same without marks, as most published templates have it.
UNMARKED = re.sub(r"{% (end)?generation %}", "", MARKED)
# Leaves out what the assistant thought in earlier turns, so that a conversation does not continue its beginning.
FORGETFUL = UNMARKED.replace("{{ m.content +", "{{ (m.content if loop.last else m.content.split('>')[-1]) +")


def save_tokenizer(folder: Path, kind: str = "qwen", template: str | None = UNMARKED) -> Path:
    """Save a small tokenizer of a kind of `small_tokenizers.KINDS` with the tokens of ChatML."""
    from transformers import AutoTokenizer

    small_tokenizers.KINDS[kind](folder)
    return with_template(folder, folder, template, AutoTokenizer.from_pretrained(folder))


def with_template(source: Path, folder: Path, template: str | None, tokenizer: Any = None) -> Path:
    """Save the tokenizer in `source` with another template."""
    from transformers import AutoTokenizer

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def conversations_in(language: str, number: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one or two turns in a language: the assistant repeats a word that it is given."""
    sentences = small_tokenizers.documents_in(language, number, seed)
    actual = []
    for index, text in enumerate(sentences):
        words = text.split()
        messages = [{"role": "system", "content": "Repeat"}] if index % 3 == 0 else []
        for word in words[: 1 + index % 2]:
            messages.append({"role": "user", "content": f"{word} {words[2]}"})
            messages.append({"role": "assistant", "content": f"{word} {word}" + "🎉" * (index % 5 == 0)})
        actual.append(messages)
    return actual


def write_conversations(path: Path, language: str, number: int, seed: int = 0) -> Path:
    lines = [{"messages": messages, "lang": language} for messages in conversations_in(language, number, seed)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path
