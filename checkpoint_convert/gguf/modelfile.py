"""Ollama's Modelfile of a GGUF file: the template of its dialogues, where an answer ends, and how tokens are drawn."""

from pathlib import Path
from typing import Any

from checkpoint_convert.gguf.chat_format import ChatFormat, Inexpressible, Messages
from moelpr.base.chat_templates import renders_template
from moelpr.base.errors import UserError
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.model.families.hf_config import read_config

# Parameter of Ollama → that of generation_config.json.
_PARAMETERS = {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
_PARAMETERS |= {"repeat_penalty": "repetition_penalty"}
_MOST_CONTEXT = 8192  # tokens; more memory than most want for a chat


def modelfile(folder: Path, gguf: str) -> tuple[str | None, str]:
    """The Modelfile of a Hugging Face directory, and what it says about dialogues.

    Returns:
        None for the file if the chat template cannot be expressed; the sentence then says why.
    """
    from transformers import GenerationConfig

    tokenizer = open_hf_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        template, note = "{{ .Prompt }}", "the tokenizer has no chat template, so the model continues text"
        stops: list[str] = []
    else:
        try:
            chat = ChatFormat.of(lambda messages, answer: rendered(tokenizer, messages, answer))
            template, stops = chat.go_template(), [chat.assistant[1].strip()]
        except (Inexpressible, UserError) as error:
            return None, f"no Modelfile: Ollama's templates cannot express this chat template ({error})"
        note = "the template renders what the chat template does"
        note += "" if chat.system else "; it has no system messages"
    has_settings = (folder / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(folder).to_diff_dict() if has_settings else {}
    end = settings.get("eos_token_id")
    ids = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
    stops += [tokenizer.convert_ids_to_tokens(id) for id in ids if id is not None]
    window = min(_MOST_CONTEXT, int(read_config(folder).get("max_position_embeddings") or _MOST_CONTEXT))
    parameters = {name: settings.get(key) for name, key in _PARAMETERS.items()} | {"num_ctx": window}
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items() if value is not None]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and '"' not in stop]
    return "\n".join(lines) + "\n", note


def rendered(tokenizer: Any, messages: Messages, answer: bool) -> str:
    """The prompt of a conversation, without the BOS that llama.cpp adds itself."""
    with renders_template():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
