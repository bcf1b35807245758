"""Continuations of held-out text: a prompt per language, continued by each model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moelpr.evaluate.models import LoadedModel

PROMPT_WORDS = 7
PROMPT_CHARACTERS = 10  # in scripts without spaces between words
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai


@dataclass(frozen=True)
class Prompt:
    """The first words of a document, and the rest of its line as reference."""

    text: str
    reference: str


def choose_prompt(documents: Sequence[str]) -> Prompt:
    """The first words of the first document whose line continues for as long again, or else of the longest one."""
    best = Prompt("", "")
    for document in documents:
        line = document.strip().split("\n", 1)[0]
        cut = _prompt_end(line)
        prompt = Prompt(line[:cut].rstrip(), line[cut:].strip())
        if len(prompt.reference) >= len(prompt.text) > 0:
            return prompt
        best = max(best, prompt, key=lambda candidate: len(candidate.text) + len(candidate.reference))
    return best


def _prompt_end(line: str) -> int:
    if len(_NO_SPACES.findall(line[:40])) > 10:
        return PROMPT_CHARACTERS
    words = list(re.finditer(r"\S+", line))
    return words[min(PROMPT_WORDS, len(words)) - 1].end() if words else 0


@torch.inference_mode()
def continue_prompt(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Continue `prompt` with the most likely token each time, at most `max_new_tokens`, up to EOS or a line break.

    `loaded` must be a Hugging Face model.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=loaded.eos_id,
        pad_token_id=loaded.eos_id if loaded.eos_id is not None else loaded.start_id,
    )
    ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    inputs = torch.tensor([ids], device=loaded.device)
    output = loaded.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    # Decoded together with the prompt, because some tokenizers drop a leading space.
    prompt_text = loaded.tokenizer.decode(ids[1:], skip_special_tokens=True)
    text = loaded.tokenizer.decode(output[0, 1:].tolist(), skip_special_tokens=True)[len(prompt_text) :]
    line = next((line for line in text.split("\n") if line.strip()), "")
    return line.rstrip("\ufffd ")  # the last character may be incomplete
