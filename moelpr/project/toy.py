"""The project of `moelpr demo`: text of drawn words, a small base that has read some of it, and a languages.yaml."""

import json
import random
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, write_text
from moelpr.base.yaml_files import dump

STEMS = {
    "en": "light kitchen door house water window morning garden letter open close bring under between",
    "es": "luz cocina puerta casa agua ventana mañana jardín carta abrir cerrar traer bajo entre",
    "el": "φως κουζίνα πόρτα σπίτι νερό παράθυρο πρωί κήπος γράμμα ανοίγω κλείνω φέρνω κάτω ανάμεσα",
    "hu": "fény konyha ajtó ház víz ablak reggel kert levél nyitni csukni hozni alatt között",
}
ENDINGS = {"en": ["", "s", "ing"], "es": ["", "s", "ando"], "el": ["", "ς", "ου", "ων"], "hu": ["", "ban", "hoz", "ől"]}
_DOCUMENTS = {"en": 400, "es": 400, "el": 1000, "hu": 1000}
_SEEN = 20  # documents of each new language that the base has read
_BATCH = {"seq-length": 64, "global-batch-size": 16, "micro-batch-size": 16, "log-interval": 50, "lr": 2e-3}
_STEPS = 150


def documents_in(language: str, number: int, seed: int = 0) -> list[str]:
    """Documents of four sentences, whose words are drawn at random."""
    draw = random.Random(f"{seed} {language}")
    words = [stem + ending for stem in STEMS[language].split() for ending in ENDINGS[language]]
    sentences = [[" ".join(draw.choices(words, k=7)).capitalize() for _ in range(4)] for _ in range(number)]
    return [". ".join(parts) + f".\n{draw.randrange(1000)}" for parts in sentences]


def write_toy(folder: Path) -> Path:
    """Write text, base and languages.yaml, whose paths are relative to the current folder; return the file.

    Raises:
        UserError: The folder has other files.
    """
    path = folder / "languages.yaml"
    if path.is_file() and path.read_text(errors="replace").startswith(f"model: {folder / 'base'}\n"):
        return path
    there = {one.name for one in folder.glob("[!.]*")}  # a killed start leaves temporary files with a dot
    if there - {"base", *(f"{language}.jsonl" for language in STEMS)}:
        raise UserError(f"{folder} has files that are not the demo's; pass --output with another folder")
    texts = {language: documents_in(language, number) for language, number in _DOCUMENTS.items()}
    for language, documents in texts.items():
        write_text(folder / f"{language}.jsonl", "".join(f"{json.dumps({'text': text})}\n" for text in documents))
    if not (folder / "base").exists():
        _save_base(folder / "base", texts)
    groups = {"expanded": ("el", "hu"), "original": ("en", "es")}
    content: dict[str, Any] = {
        "model": str(folder / "base"),
        "output": str(folder / "out"),
        "languages": {group: {code: f"{folder}/{code}.jsonl" for code in codes} for group, codes in groups.items()},
        "budget": {"tokens": _STEPS * 16 * 64},
        "method": "auto",
        "hardware": {"gpu": "none"},
        "steps": {
            "preprocess": {"workers": 1},
            "ffn": _BATCH,
            "stage2": _BATCH | {"train-iters": _STEPS},
            "combine": {"max-tokens": 2048},
            "evaluate": {"sequence-length": 64, "continuations": 0},
            "routing": {"sequence-length": 64},
        },
    }
    write_text(path, dump(content))
    return path


def _save_base(folder: Path, texts: dict[str, list[str]]) -> None:
    """Train a small Qwen2 on the original languages, and on a little of the others, as real bases have read."""
    import torch
    from transformers import Qwen2Tokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"{folder}: training a base", flush=True)
    tokenizer: Any = Qwen2Tokenizer().train_new_from_iterator(
        (text for documents in texts.values() for text in documents), 700, show_progress=False
    )
    read = [text for language in ("en", "es") for text in texts[language]]
    read += [text for language in ("el", "hu") for text in texts[language][:_SEEN]]
    random.Random(0).shuffle(read)
    ids = [id for text in read for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    model = untrained_qwen2(tokenizer, hidden_size=64, num_hidden_layers=4, intermediate_size=192)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(_STEPS):
        batch = rows[torch.arange(step * 32, (step + 1) * 32) % len(rows)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    save_model(model, tokenizer, folder)


def untrained_qwen2(tokenizer: Any, *, seed: int = 1234, **shape: int) -> Any:
    """A Qwen2 (qkv bias, grouped queries, RMSNorm, SwiGLU, RoPE, tied embeddings) with random weights.

    Args:
        shape: Fields of Qwen2Config.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{"max_position_embeddings": 512, "num_attention_heads": 4, "num_key_value_heads": 2, **shape},
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


def save_model(model: Any, tokenizer: Any, save: Path) -> None:
    with atomic_directory(save) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
