"""The model card of an export (README.md), from the records of the conversion and of the runs that trained it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_convert.megatron_folder import MegatronReader, num_elements
from moelpr import yaml_files
from moelpr.checkpoints import RELEASE, BaseCheckpoint, step_folder
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER, METRICS_FILE, RECIPE_FILE, VERSIONS_FILE, read_json, read_settings
from moelpr.run_metrics import read_run_metrics
from moelpr.stages import Part, trained_parts
from moelpr.versions import installed_versions

CARD_FILE = "README.md"
# An export contains the card of the base model under this name.
BASE_CARD_FILE = "README-base.md"
# In a checkpoint's hf/, which the trainer copies.
ORIGIN_FILE = "origin.json"

# --- history


@dataclass(frozen=True)
class Origin:
    """What a converter made a checkpoint from; None for what is unknown or does not apply.

    Attributes:
        base_model: Name of the model's folder, or of the base in an adapter.
        settings: How new experts started (`upcycling.Start`).
        adapter: Name of the adapter that the experts come from.
        copy_of: Step folder whose weights the checkpoint has.
    """

    base_model: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    copy_of: str | None = None

    def write(self, checkpoint: Path) -> None:
        (checkpoint / HF_FOLDER).mkdir(exist_ok=True)
        (checkpoint / HF_FOLDER / ORIGIN_FILE).write_text(json.dumps(vars(self), indent=2) + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "Origin | None":
        """None if no converter recorded it."""
        content = read_json(checkpoint / HF_FOLDER / ORIGIN_FILE)
        if content is None:
            return None
        kinds = {"base_model": str, "settings": dict, "adapter": str, "copy_of": str}
        valid = {key: content[key] for key, kind in kinds.items() if isinstance(content.get(key), kind)}
        return cls(**{"base_model": None, **valid})


@dataclass(frozen=True)
class TrainedStage:
    """One run that trained the model, up to the step that the next run started from or that is exported.

    Attributes:
        settings: Every flag with its final value.
        first: The metrics of the first step; `last`: of `step`. None if the run has no metrics of `step`.
        versions: Versions of the packages at the run's last start.
    """

    folder: Path
    step: int
    settings: dict[str, Any]
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> frozenset[Part]:
        """The parts that it trained; empty for an unknown stage."""
        stage: Any = self.settings.get("stage")
        try:
            return trained_parts(stage, bool(self.settings.get("train_everything")))
        except KeyError:
            return frozenset()

    @property
    def trained_everything(self) -> bool:
        return self.trained == frozenset(Part)


@dataclass(frozen=True)
class History:
    """Stages, oldest first, and the folder that the oldest one started from if its records were not found."""

    stages: list[TrainedStage]
    missing: str | None = None


def read_history(checkpoint: Path, iteration: int | None = None) -> History:
    """The stages that trained the model in `checkpoint`, as far as their folders still exist under the same names.

    Args:
        checkpoint: Checkpoint folder.
        iteration: Saved step; None for the latest.
    """
    spec = ModelSpec.read(checkpoint)
    stages: list[TrainedStage] = []
    seen: set[Path] = set()
    folder, step = checkpoint, step_folder(checkpoint, iteration)
    missing: str | None = None
    while missing is None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        if step.name == RELEASE:
            origin = Origin.read(folder)
            if origin is None or origin.copy_of is None:
                break
            missing, step = origin.copy_of, Path(origin.copy_of)
            if step.is_dir() and _has_spec(step.parent, spec):
                missing, folder = None, step.parent
            continue
        settings = read_settings(step) or read_settings(folder)
        if settings is None:
            missing = str(folder) if stages else None
            break
        stages.append(_read_stage(folder, int(step.name.removeprefix("iter_")), settings))
        first = _first_start(folder, settings)
        start = _start_of(folder, first or settings)
        if start is None:
            break
        found = _find_start(folder, Path(start), first, spec)
        if found is None:
            missing = start
        else:
            folder, step = found.parent, found
    return History(stages[::-1], missing)


def _first_start(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that the run in `folder` first started with; None if only resumed starts are recorded."""
    saved = [read_settings(path.parent) for path in sorted(folder.glob(f"iter_*/{RECIPE_FILE}"))]
    return next((start for start in [settings, *saved] if start and not start.get("is_resumed")), None)


def _start_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The folder, as named then, that the run in `folder` took its weights from at its first start."""
    own = [folder.resolve(), Path(settings.get("save") or folder).resolve()]
    starts = [settings.get(name) for name in ("model_source", "pretrained_checkpoint")]
    return next((start for start in starts if start and Path(start).resolve() not in own), None)


def _find_start(folder: Path, start: Path, first: dict[str, Any] | None, spec: ModelSpec) -> Path | None:
    """The step folder that the run started from; None if it is missing or ambiguous."""
    try:
        base = BaseCheckpoint.read(folder)
        if base is not None:
            return base.find(folder)
        if not _has_spec(start, spec) or (first is None and len(list(start.glob("iter_*"))) > 1):
            return None
        return step_folder(start, first.get("ckpt_step") if first else None)
    except UserError:
        return None


def _has_spec(checkpoint: Path, spec: ModelSpec) -> bool:
    try:
        return ModelSpec.read(checkpoint) == spec
    except UserError:
        return False


def _read_stage(folder: Path, step: int, settings: dict[str, Any]) -> TrainedStage:
    try:
        records = [record for record in read_run_metrics(folder / METRICS_FILE).steps if record["iteration"] <= step]
    except UserError:
        records = []
    reaches_step = bool(records) and records[-1]["iteration"] == step
    first, last = (records[0], records[-1]) if reaches_step else (None, None)
    return TrainedStage(folder, step, settings, first, last, read_json(folder / VERSIONS_FILE) or {})


def check_separable(model: Path, spec: ModelSpec, history: History, output: str, instead: str) -> None:
    """UserError unless the model is a base with routers and new experts, and nothing else was trained.

    Args:
        output: What is to be written, "a delta" or "an adapter".
        instead: The fix, for the error message.
    """
    if spec.moe is None:
        raise UserError(f"{model} is dense and has no experts for {output}; {instead}")
    for stage in history.stages:
        if stage.trained_everything:
            raise UserError(
                f"{stage.folder} trained all parameters (--train-everything), but {output} contains only routers and "
                f"new experts; {instead}"
            )


# --- card

_STAGE_TITLES = {
    "stage1": "Stage 1 (post-pretrain)",
    "stage2": "Stage 2 (review)",
    "dense": "Training of the dense model",
}
# Keys in the front matter of the base's card that also apply to the export.
_INHERITED = ("language", "license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """What an export's card is written from; unknown details are omitted.

    Attributes:
        source: The checkpoint.
        architecture: Class of the export.
        dtype: Dtype of the export.
        base_model: Name of the base, on the Hub (owner/name) or of its folder.
    """

    source: MegatronReader
    architecture: str
    dtype: str
    base_model: str | None
    origin: Origin | None
    history: History

    @classmethod
    def read(
        cls, source: MegatronReader, iteration: int | None, architecture: str, dtype: str, base_model: str | None
    ) -> "CardFacts":
        """Read what is recorded about a checkpoint; `base_model` overrides the recorded name."""
        origin = Origin.read(source.folder)
        base_model = base_model or (origin.base_model if origin else None)
        return cls(source, architecture, dtype, base_model, origin, read_history(source.folder, iteration))

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec


def model_card(facts: CardFacts, is_delta: bool = False) -> str:
    """README.md of an export, or of a delta: front matter for the Hugging Face Hub, then Markdown."""
    path = facts.source.folder / HF_FOLDER / CARD_FILE
    base_card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    name, moe = (facts.base_model or facts.spec.family).rpartition("/")[2], facts.spec.moe
    title = name if moe is None else f"{name} with {moe.num_new_experts} new experts"
    parts = [_front_matter(facts, base_card), f"# {title}", _summary(facts, base_card), _table(_model_rows(facts))]
    parts += ["## Training", _start(facts)]
    for stage in facts.history.stages:
        kind = str(stage.settings.get("stage"))
        parts += [f"### {_STAGE_TITLES.get(kind, kind)}", _table(_stage_rows(stage))]
    parts.append("" if facts.history.stages else "No training is recorded.")
    base = (facts.base_model or "BASE").rpartition("/")[2]
    parts += ["## Use", _APPLY_DELTA.format(base=base) if is_delta else "", _USE.format(dtype=facts.dtype)]
    parts.append(f"Exported with {_versions(installed_versions())}.")
    return "\n\n".join(part for part in parts if part) + "\n"


_APPLY_DELTA = """This folder is a delta: routers and new experts. Everything else is in the base model. To
combine both:

```bash
python -m checkpoint_convert.apply_delta --base {base} \\
    --delta path/to/the/delta --save path/to/this/folder
```"""

_USE = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

```bash
vllm serve path/to/this/folder
lm_eval --model hf --model_args pretrained=path/to/this/folder --tasks belebele
```"""


def _front_matter(facts: CardFacts, base_card: str | None) -> str:
    match = re.match(r"---\r?\n(.*?)\n---\r?\n", base_card or "", re.DOTALL)
    try:
        base = yaml_files.parse_mapping(match[1], "front matter of the model card") if match else {}
    except UserError:
        base = {}
    content: dict[str, Any] = {name: base[name] for name in _INHERITED if name in base}
    content |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model):
        content["base_model"] = facts.base_model
    content["tags"] = ["moe", "moe-lpr"] if facts.spec.moe else ["moe-lpr"]
    return f"---\n{yaml_files.dump(content)}---"


def _summary(facts: CardFacts, base_card: str | None) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else f"a {facts.spec.family} model"
    if base_card is not None:
        base += f" ([its own card]({BASE_CARD_FILE}))"
    stock, moe = f"A stock `{facts.architecture}`: no custom code.", facts.spec.moe
    if moe is None:
        return f"Made of {base}. {stock}"
    kept, new = "expert 0 is the base's FFN", f"experts {moe.num_original_experts} to {moe.num_experts - 1} are new"
    if moe.num_original_experts > 1:
        kept = f"experts 0 to {moe.num_original_experts - 1} are the base's"
    if moe.num_new_experts == 1:
        new = f"expert {moe.num_original_experts} is new"
    return (
        f"{base[0].upper() + base[1:]}, made a mixture of experts to learn more languages without losing those it "
        f"has ([MoE-LPR](https://arxiv.org/abs/2408.11396)): in each MoE layer {kept}, {new}. {stock}"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["|  |  |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows if value)])


def _model_rows(facts: CardFacts) -> list[tuple[str, str]]:
    args, moe = facts.spec.megatron_args, facts.spec.moe
    total = num_elements(facts.source.pieces)
    rows = [("architecture", f"`{facts.architecture}`"), ("dtype", facts.dtype), ("parameters", f"{total:,}")]
    if moe is not None:
        new = num_elements([piece for piece in facts.source.pieces if piece.part is Part.NEW_EXPERTS])
        active = total - new // moe.num_new_experts * (moe.num_experts - moe.topk)
        layers = "all" if len(moe.layers) == args["num_layers"] else ", ".join(map(str, moe.layers))
        rows.append(("active parameters per token", f"{active:,}"))
        rows.append(("experts", f"{moe.num_experts}, {moe.topk} per token"))
        rows.append(("MoE layers", f"{len(moe.layers)} of {args['num_layers']} ({layers})"))
    return [*rows, ("context", f"{args['max_position_embeddings']:,} tokens")]


def _start(facts: CardFacts) -> str:
    if facts.history.missing is not None:
        return f"Earlier training is not recorded: the first stage below started from `{facts.history.missing}`."
    if facts.origin is None or facts.spec.moe is None:
        return ""
    if facts.origin.adapter is not None:
        return f"Routers and new experts came from the adapter `{facts.origin.adapter}` of the published MoE-LPR code."
    how = facts.origin.settings
    if how.get("new_experts") not in ("random", "copied"):
        return ""
    start = "New experts started " + ("at random" if how["new_experts"] == "random" else "as copies")
    if how.get("noise"):
        start += f", with noise of {how['noise']:g} times the weights' standard deviation"
    if how.get("reinitialise"):
        start += f", {how['reinitialise']:.0%} of their FFN dimensions reinitialized"
    return start + (f" (seed {how['seed']})." if "seed" in how else ".")


def _stage_rows(stage: TrainedStage) -> list[tuple[str, str]]:
    """What the run recorded, one row each; the value is empty if a setting is not recorded."""
    settings, last = stage.settings, stage.last or {}
    trained = " and ".join(part.value for part in Part if part in stage.trained)
    trained = "all parameters" if stage.trained_everything else trained and f"{trained}; everything else is frozen"
    warm_up = _filled(settings, "{lr_warmup_iters:,} steps") if settings.get("lr_warmup_iters") else ""
    if settings.get("lr_warmup_fraction"):
        warm_up = _filled(settings, "{lr_warmup_fraction:.2%} of the decay")
    optimizer = settings.get("optimizer") or ""
    if optimizer == "adam":
        optimizer += _filled(settings, " (betas {adam_beta1:g}, {adam_beta2:g}; eps {adam_eps:g})")
    formula = f" ({settings['lpr_loss']} formula)" if settings.get("lpr_loss") else ""
    precision = ""
    if settings.get("bf16") is not None and settings.get("fp16") is not None:
        precision = "bf16" if settings["bf16"] else "fp16" if settings["fp16"] else "fp32"
    return [
        ("trained", trained),
        ("data", _data(settings)),
        ("steps", f"{stage.step:,}"),
        ("tokens", f"{last['consumed_tokens']:,}" if last.get("consumed_tokens") else ""),
        ("next-token loss, first to last step", _change(stage, "lm_loss")),
        ("… on original-language text", _change(stage, "lm_loss_original")),
        ("… on expanded-language text", _change(stage, "lm_loss_expanded")),
        *(
            (f"{loss} loss, first to last step", _change(stage, key) if settings.get(f"{key}_coeff") else "")
            for loss, key in (("balance", "balance_loss"), ("LPR", "lpr_loss"))
        ),
        ("global batch", _filled(settings, "{global_batch_size:,} sequences of {seq_length:,} tokens")),
        ("learning rate", _filled(settings, "{lr:g} to {min_lr:g}, {lr_decay_style}")),
        ("warm-up", warm_up),
        ("balance loss α", _filled(settings, "{balance_loss_coeff:g}") if settings.get("balance_loss_coeff") else ""),
        ("LPR loss γ", _filled(settings, "{lpr_loss_coeff:g}") + formula if settings.get("lpr_loss_coeff") else ""),
        ("optimizer", optimizer),
        ("weight decay", _filled(settings, "{weight_decay:g}")),
        ("gradient clipping", _filled(settings, "{clip_grad:g}")),
        ("precision", precision),
        ("seed", _filled(settings, "{seed}")),
        ("processes", _filled(settings, "{world_size}")),
        ("versions", _versions(stage.versions)),
    ]


def _change(stage: TrainedStage, key: str) -> str:
    first, last = ((record or {}).get(key) for record in (stage.first, stage.last))
    if first is None and last is None:
        return ""
    return " to ".join("–" if value is None else f"{value:.4g}" for value in (first, last))


def _filled(settings: dict[str, Any], template: str) -> str:
    """`template` with the settings that it names; empty if one is not recorded."""
    names = re.findall(r"\{(\w+)", template)
    return "" if any(settings.get(name) is None for name in names) else template.format_map(settings)


def _data(settings: dict[str, Any]) -> str:
    """Megatron's blend: prefixes, or alternating weights and prefixes."""
    blend = settings.get("data_path") or settings.get("train_data_path")
    if not isinstance(blend, list):
        listed = settings.get("data_args_path") or settings.get("per_split_data_args_path")
        return f"the list `{listed}`" if listed else ""
    blend = [str(item) for item in blend]
    if len(blend) % 2 == 0 and all(re.fullmatch(r"[\d.]+(e-?\d+)?", item) for item in blend[::2]):
        return ", ".join(f"`{path}` (weight {weight})" for weight, path in zip(blend[::2], blend[1::2], strict=True))
    return ", ".join(f"`{path}`" for path in blend)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
