"""Continuations of held-out text: a prompt per language, continued by each model."""

import re
from collections.abc import Sequence

import torch

from moelpr.evaluate.models import LoadedModel

PROMPT_WORDS = 7
PROMPT_CHARACTERS = 10  # in scripts without spaces between words
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai


def choose_prompt(documents: Sequence[str]) -> tuple[str, str]:
    """The first words of the first document whose line continues for as long again, or else of the longest one.

    Returns:
        These words, and the rest of the line as reference.
    """
    best = ("", "")
    for document in documents:
        line = document.strip().split("\n", 1)[0]
        words = list(re.finditer(r"\S+", line))[:PROMPT_WORDS]
        cut = words[-1].end() if words else 0
        if len(_NO_SPACES.findall(line[:40])) > 10:
            cut = PROMPT_CHARACTERS
        prompt, reference = line[:cut].rstrip(), line[cut:].strip()
        if len(reference) >= len(prompt) > 0:
            return prompt, reference
        best = max(best, (prompt, reference), key=lambda parts: len(parts[0]) + len(parts[1]))
    return best


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
