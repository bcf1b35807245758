"""A project that a CPU finishes in a minute: a tiny Qwen2, and text in FineWeb-2's layout."""

import json
from pathlib import Path
from typing import Any

from benchmarks.common import qwen2_config, save_random_model
from moelpr.base.yaml_files import dump
from tests.support.packed_files import parquet_table
from tests.support.small_tokenizers import documents_in, save_qwen

# Language → its folder, of which `train` is to be read.
FINEWEB_2 = {"el": "ell_Grek", "hu": "hun_Latn", "en": "eng_Latn", "es": "spa_Latn"}
HELD_BACK = "this document is in no training text"


def write_project(folder: Path, steps: int = 12, is_for_chat: bool = False) -> Path:
    """Write base, text and languages.yaml; paths in it are relative to `folder`. Returns the file.

    Args:
        steps: Steps of each stage.
        is_for_chat: Also extend the vocabulary, train on conversations, and add the post-training of another model.
    """
    _save_models(folder / "base", folder / "chat" if is_for_chat else None)
    text = folder / "fineweb-2" / "data"
    for language, name in FINEWEB_2.items():
        documents = documents_in(language, 240)
        held_back = dict.fromkeys((f"{name}/test", f"{name}_removed/train"), [f"{HELD_BACK} {language}"])
        for part, chosen in ({f"{name}/train": documents} | held_back).items():
            _write_fineweb(text / part / "000_00000.parquet", chosen, name)
    batch = {"seq-length": 64, "global-batch-size": 8, "micro-batch-size": 4, "log-interval": 4, "save-interval": 4}

    def folders(*languages: str) -> dict[str, Any]:
        return {language: f"fineweb-2/data/{FINEWEB_2[language]}" for language in languages}

    content: dict[str, Any] = {
        "model": "base",
        "output": "out",
        "languages": {"expanded": folders("el", "hu"), "original": folders("en", "es")},
        "budget": {"tokens": steps * 64 * 8},
        "method": "moe-lpr",
        "replay": {"original_documents": 100, "expanded_documents": 100},
        "held_out": 5,
        "experts": {"new": 2},
        "hardware": {"gpu": "none"},
        "steps": {
            "preprocess": {"workers": 1},
            "stage1": batch,
            "stage2": batch | {"train-iters": steps},
            "evaluate": {"sequence-length": 64, "continuations": 0},
            "routing": {"sequence-length": 64},
        },
    }
    if is_for_chat:
        content |= {"vocabulary": {"new_tokens": 40}, "chat": "chat"}
        content["steps"] |= {"stage0": batch, "sft": batch | {"train-iters": 2}, "conversations": {"workers": 1}}
        for group, language in (("expanded", "el"), ("original", "en")):
            turns = [[("user", text), ("assistant", text[::-1])] for text in documents_in(language, 20)]
            lines = [{"messages": [{"role": role, "content": text[:9]} for role, text in turn]} for turn in turns]
            (folder / f"{language}-chat.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            languages = content["languages"][group]
            languages[language] = {"text": languages[language], "conversations": f"{language}-chat.jsonl"}
    path = folder / "languages.yaml"
    path.write_text(dump(content))
    return path


def _save_models(folder: Path, chat: Path | None) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    save_qwen(folder)
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    save_random_model(qwen2_config(2, 32, 48, 512, length=128, eos_token_id=eos), folder)
    if chat:
        model = Qwen2ForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std())
        save_qwen(chat)
        model.save_pretrained(chat)


def _write_fineweb(path: Path, documents: list[str], name: str) -> None:
    """A table with columns of FineWeb-2, in several row groups."""
    language, script = name.split("_")
    others = {"dump": "CC-MAIN-2024-10", "language": language, "language_score": 0.9, "language_script": script}
    rows = [{"text": text, "id": f"<urn:uuid:{number:016x}>", **others} for number, text in enumerate(documents)]
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet_table(rows, rows_per_group=50))
