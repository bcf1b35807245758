"""A short continuation of held-out text by each model: the numbers made visible."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moelpr.evaluate.models import LoadedModel

PROMPT_WORDS = 7
PROMPT_CHARACTERS = 10  # where a script writes no spaces between words
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai


@dataclass(frozen=True)
class Prompt:
    """The first words of a document and how the document itself goes on."""

    text: str
    reference: str


def choose_prompt(documents: Sequence[str]) -> Prompt:
    """The first words of the first document that goes on in the same line for as long again, or of the longest one."""
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


def continue_prompts(
    loaded: LoadedModel,
    prompts: Mapping[str, str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 1,
) -> dict[str, str]:
    """Continuation of each prompt (name -> text), at most `max_new_tokens` long, ended early by EOS or a line's end.

    temperature 0 takes the likeliest token each time; above 0 tokens are drawn, the same ones for the same `seed`.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        eos_token_id=loaded.eos_id,
        pad_token_id=loaded.eos_id if loaded.eos_id is not None else loaded.start_id,
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    continuations = {}
    for name, prompt in prompts.items():
        ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        inputs = torch.tensor([ids], device=loaded.device)
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            output = loaded.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        # Decoded together with the prompt, because some tokenizers drop a leading space.
        before = loaded.tokenizer.decode(ids[1:], skip_special_tokens=True)
        text = loaded.tokenizer.decode(output[0, 1:].tolist(), skip_special_tokens=True)[len(before) :]
        lines = [line for line in text.split("\n") if line.strip()]
        continuations[name] = lines[0].rstrip("\ufffd ") if lines else ""  # the last character may be half-written
    return continuations
