"""The model card of an export (README.md): what was trained on what, from the records of the runs and nothing else."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from checkpoint_convert.history import History, Origin, Stage, read_history
from checkpoint_convert.megatron_folder import MegatronReader
from moelpr import yaml_files
from moelpr.errors import UserError
from moelpr.families.tables import Piece
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER
from moelpr.versions import installed_versions

FILE_NAME = "README.md"
# The base model's own card goes along under this name.
BASE_CARD_FILE = "README-base.md"

_STAGE_TITLES = {
    "stage1": "Stage 1 (post-pretrain)",
    "stage2": "Stage 2 (review)",
    "dense": "Training of the dense model",
}
_TRAINED = {
    "stage1": "new experts and routers; everything else is frozen",
    "stage2": "routers; everything else is frozen",
    "dense": "all parameters",
}
# Front matter of the base's card that holds for the export too.
_INHERITED = ("language", "license", "license_name", "license_link")


@dataclass(frozen=True)
class Facts:
    """What a card can speak of; whatever isn't known is left out.

    num_parameters, num_active_parameters: of the whole model, and those that a token meets.
    base_model: name of the base, one of the hub (owner/name) or a folder's. base_card: its README.md.
    versions: of the programs that exported.
    """

    spec: ModelSpec
    architecture: str
    dtype: str
    num_parameters: int
    num_active_parameters: int
    history: History
    versions: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    base_card: str | None = None
    origin: Origin | None = None


def read_facts(
    source: MegatronReader, iteration: int | None, architecture: str, dtype: str, base_model: str | None = None
) -> Facts:
    """What is on record about the checkpoint that `source` reads.

    base_model: name of the base; None for the one on record.
    """
    origin = Origin.read(source.folder)
    base_card = source.folder / HF_FOLDER / FILE_NAME
    return Facts(
        source.spec,
        architecture,
        dtype,
        *count_parameters(source.pieces, source.spec),
        history=read_history(source.folder, iteration),
        versions=installed_versions(),
        base_model=base_model or (origin.base_model if origin else None),
        base_card=base_card.read_text(encoding="utf-8", errors="replace") if base_card.is_file() else None,
        origin=origin,
    )


def model_card(facts: Facts, is_delta: bool = False) -> str:
    """README.md of an export, or of a delta: front matter as the Hugging Face hub reads it, then Markdown."""
    parts = [_front_matter(facts), f"# {_title(facts)}", _summary(facts), _model_table(facts)]
    parts += ["## Training", *_training(facts)]
    parts += ["## Use", _whole_from_delta(facts) if is_delta else "", _use(facts)]
    if facts.versions:
        parts.append(f"Exported with {_versions(facts.versions)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def count_parameters(plan: list[Piece], spec: ModelSpec) -> tuple[int, int]:
    """All parameters of the model made of the pieces `plan`, and those that a token meets."""
    total = sum(math.prod(shape) for piece in plan for shape in piece.hf_shapes)
    if spec.moe is None:
        return total, total
    experts = sum(math.prod(shape) for piece in plan if piece.role == "new expert" for shape in piece.hf_shapes)
    per_expert = experts // spec.moe.num_new_experts if spec.moe.num_new_experts else 0
    return total, total - per_expert * (spec.moe.num_experts - spec.moe.topk)


def _front_matter(facts: Facts) -> str:
    base = _read_front_matter(facts.base_card)
    content: dict[str, Any] = {name: base[name] for name in _INHERITED if name in base}
    content |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model):
        content["base_model"] = facts.base_model
    content["tags"] = ["moe", "moe-lpr"] if facts.spec.moe else ["moe-lpr"]
    return f"---\n{yaml_files.dump(content)}---"


def _read_front_matter(card: str | None) -> dict[str, Any]:
    match = re.match(r"---\r?\n(.*?)\n---\r?\n", card or "", re.DOTALL)
    try:
        return yaml_files.parse_mapping(match[1], "front matter of the model card") if match else {}
    except UserError:
        return {}


def _title(facts: Facts) -> str:
    name = (facts.base_model or facts.spec.family).rpartition("/")[2]
    moe = facts.spec.moe
    return name if moe is None else f"{name} with {moe.num_new_experts} new experts"


def _summary(facts: Facts) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else f"a {facts.spec.family} model"
    if facts.base_card is not None:
        base += f" ([its own card]({BASE_CARD_FILE}))"
    moe = facts.spec.moe
    if moe is None:
        return f"Made of {base}. A stock `{facts.architecture}`: no custom code."
    kept = "expert 0 is the base's FFN"
    if moe.num_original_experts > 1:
        kept = f"experts 0 to {moe.num_original_experts - 1} are the base's"
    new = f"experts {moe.num_original_experts} to {moe.num_experts - 1} are new"
    if moe.num_new_experts == 1:
        new = f"expert {moe.num_original_experts} is new"
    return (
        f"{base[0].upper() + base[1:]}, made a mixture of experts to learn further languages without losing those it "
        f"has ([MoE-LPR](https://arxiv.org/abs/2408.11396)): in each MoE layer {kept}, {new}. A stock "
        f"`{facts.architecture}`: no custom code."
    )


def _model_table(facts: Facts) -> str:
    spec = facts.spec
    rows = [("architecture", f"`{facts.architecture}`"), ("element type", facts.dtype)]
    rows.append(("parameters", f"{facts.num_parameters:,}"))
    if spec.moe is not None:
        rows.append(("parameters a token meets", f"{facts.num_active_parameters:,}"))
        rows.append(("experts", f"{spec.moe.num_experts}, {spec.moe.topk} per token"))
        num_layers = spec.megatron_args["num_layers"]
        layers = "all" if len(spec.moe.layers) == num_layers else ", ".join(map(str, spec.moe.layers))
        rows.append(("MoE layers", f"{len(spec.moe.layers)} of {num_layers} ({layers})"))
    rows.append(("context", f"{spec.megatron_args['max_position_embeddings']:,} tokens"))
    return _table(("", ""), rows)


# ------------------------------------------------------------------------------------------------------ training


def _training(facts: Facts) -> list[str]:
    parts = [_start(facts)]
    for stage in facts.history.stages:
        kind = str(stage.settings.get("stage"))
        parts += [f"### {_STAGE_TITLES.get(kind, kind)}", _table(("", ""), _stage_rows(stage))]
    if not facts.history.stages:
        parts.append("No training is on record.")
    return parts


def _start(facts: Facts) -> str:
    if facts.history.missing is not None:
        return f"What came before is not on record here: the first stage below started from `{facts.history.missing}`."
    origin = facts.origin
    if origin is None or facts.spec.moe is None:
        return ""
    if origin.adapter is not None:
        return f"Routers and new experts came from the adapter `{origin.adapter}` of the published MoE-LPR code."
    how = origin.settings
    if how.get("new_experts") == "random":
        sentence = "New experts started at random"
    elif how.get("new_experts") == "copied":
        sentence = "New experts started as copies"
        if how.get("noise"):
            sentence += f", with noise of {how['noise']:g} times the weights' standard deviation"
        if how.get("reinitialise"):
            sentence += f", {how['reinitialise']:.0%} of their FFN dimensions drawn anew"
    else:
        return ""
    return f"{sentence} (seed {how['seed']})." if "seed" in how else f"{sentence}."


def _stage_rows(stage: Stage) -> list[tuple[str, str]]:
    """What the run's records say, a row each; a row whose setting isn't on record is left out."""
    settings = stage.settings
    trained = "all parameters" if stage.trained_everything else _TRAINED.get(str(settings.get("stage")), "")
    last = stage.last or {}
    rows = [
        ("trained", trained),
        ("data", _data(settings)),
        ("steps", f"{stage.step:,}"),
        ("tokens", f"{last['consumed_tokens']:,}" if last.get("consumed_tokens") else ""),
        *((title, _change(stage, key)) for title, key, weight in _LOSSES if weight is None or settings.get(weight)),
        ("global batch", _joined(settings, "{global_batch_size:,} sequences of {seq_length:,} tokens")),
        ("learning rate", _joined(settings, "{lr:g} to {min_lr:g}, {lr_decay_style}")),
        ("warm-up", _warm_up(settings)),
        ("balance loss α", _weight(settings, "balance_loss_coeff")),
        ("LPR loss γ", _weight(settings, "lpr_loss_coeff")),
        ("optimizer", _optimizer(settings)),
        ("weight decay", _joined(settings, "{weight_decay:g}")),
        ("gradient clipping", _joined(settings, "{clip_grad:g}")),
        ("arithmetic", _arithmetic(settings)),
        ("seed", _joined(settings, "{seed}")),
        ("processes", _joined(settings, "{world_size}")),
        ("versions", _versions(stage.versions)),
    ]
    return [(name, value) for name, value in rows if value]


# Title, key in metrics.jsonl, setting that must not be 0 for the loss to have been trained on.
_LOSSES = (
    ("next-token loss, first to last step", "lm_loss", None),
    ("… on original-language text", "lm_loss_original", None),
    ("… on expanded-language text", "lm_loss_expanded", None),
    ("balance loss, first to last step", "balance_loss", "balance_loss_coeff"),
    ("LPR loss, first to last step", "lpr_loss", "lpr_loss_coeff"),
)


def _change(stage: Stage, key: str) -> str:
    first, last = ((record or {}).get(key) for record in (stage.first, stage.last))
    if first is None and last is None:
        return ""
    return " to ".join("–" if value is None else f"{value:.4g}" for value in (first, last))


def _joined(settings: dict[str, Any], text: str) -> str:
    """`text` with the settings it names; empty where one isn't on record."""
    names = re.findall(r"\{(\w+)", text)
    if any(settings.get(name) is None for name in names):
        return ""
    return text.format(**{name: settings[name] for name in names})


def _data(settings: dict[str, Any]) -> str:
    """Megatron's blend: prefixes, or weights and prefixes in turn."""
    words = settings.get("data_path") or settings.get("train_data_path")
    if not isinstance(words, list):
        listed = settings.get("data_args_path") or settings.get("per_split_data_args_path")
        return f"the list `{listed}`" if listed else ""
    words = [str(word) for word in words]
    if len(words) % 2 == 0 and all(re.fullmatch(r"[\d.]+(e-?\d+)?", word) for word in words[::2]):
        return ", ".join(f"`{path}` (weight {weight})" for weight, path in zip(words[::2], words[1::2], strict=True))
    return ", ".join(f"`{path}`" for path in words)


def _warm_up(settings: dict[str, Any]) -> str:
    if settings.get("lr_warmup_fraction"):
        return f"{settings['lr_warmup_fraction']:.2%} of the decay"
    return f"{settings['lr_warmup_iters']:,} steps" if settings.get("lr_warmup_iters") else ""


def _weight(settings: dict[str, Any], name: str) -> str:
    """A loss's weight, where the loss was used."""
    if not settings.get(name):
        return ""
    kind = settings.get("lpr_loss") if name == "lpr_loss_coeff" else None
    return f"{settings[name]:g}" + (f" ({kind} formula)" if kind else "")


def _optimizer(settings: dict[str, Any]) -> str:
    betas = _joined(settings, " (betas {adam_beta1:g}, {adam_beta2:g}; eps {adam_eps:g})")
    optimizer = settings.get("optimizer")
    return f"{optimizer}{betas if optimizer == 'adam' else ''}" if optimizer else ""


def _arithmetic(settings: dict[str, Any]) -> str:
    if settings.get("bf16") is None or settings.get("fp16") is None:
        return ""
    return "bf16" if settings.get("bf16") else "fp16" if settings.get("fp16") else "fp32"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# ----------------------------------------------------------------------------------------------------------- use


def _whole_from_delta(facts: Facts) -> str:
    return f"""This folder is a delta: routers and new experts, without the rest, which is the base. moelpr makes the
model of both:

```bash
python -m checkpoint_convert.apply_delta --base {(facts.base_model or "BASE").rpartition("/")[2]} \\
    --delta path/to/the/delta --save path/to/this/folder
```"""


def _use(facts: Facts) -> str:
    dtype = f"torch.{facts.dtype}"
    return f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype={dtype})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

```bash
vllm serve path/to/this/folder
lm_eval --model hf --model_args pretrained=path/to/this/folder --tasks belebele
```"""


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows])
