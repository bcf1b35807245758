"""The training tasks of a project: upcycling and the stages, with as many tokens as the budget and the text allow."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import FINISHED_FILE
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.model_spec import FILE_NAME as SPEC_FILE
from moelpr.plan.gpus import GPUS, Cluster
from moelpr.project.budget import estimated_tokens, shares, tokens_of, total_tokens
from moelpr.project.places import Places
from moelpr.project.steps import LENGTH_FLAGS, recipe_of, settings, words
from moelpr.project.workflow.task import Task
from moelpr.train.arguments.recipes import find_recipe

# New rows also learn to be unlikely in the original languages: one part in five (docs/vocabulary.md).
_STAGE0_SHARE, _STAGE0_ORIGINAL = 0.1, 0.25
# docs/vocabulary.md; weights of experts and routers do not train there.
_STAGE0_FLAGS = {"lr": 1e-3, "balance-loss-coeff": 0.0}


def training_tasks(places: Places) -> list[Task]:
    """Conversion and the stages, in order; or LoRA."""
    if places.method == "lora":
        return [lora(places)]
    befores = ["convert", *places.stages]
    return [convert(places), *(stage(places, name, befores[place]) for place, name in enumerate(places.stages))]


def convert(places: Places) -> Task:
    """Upcycle the base; for a method without experts, convert it as it is."""
    project = places.project
    fixed: dict[str, Any] = {
        "hf-path": places.base,
        "save": places.converted,
        "extended-tokenizer": places.tokenizer if project.vocabulary else None,
        **(_experts(places) or {"dense": True}),
        "overwrite": True,
    }
    return Task(
        name="convert",
        command=words("convert", places.own("convert"), fixed),
        made_from=("vocabulary",) if project.vocabulary else places.base_task,
        files=() if places.is_downloaded else (places.base,),
        is_complete=(places.converted / SPEC_FILE).is_file,
        disk_gib=places.layouts.export_gib,
    )


def _experts(places: Places) -> dict[str, Any]:
    """How the model grows, as flags without dashes; empty if it does not."""
    experts = places.project.experts
    if places.method != "moe-lpr":
        return {}
    return {
        "num-new-experts": places.layouts.num_new_experts,
        "topk": experts.topk,
        "original-copies": experts.copies,
        "moe-every-k-layers": experts.every_k_layers,
    }


def lora(places: Places) -> Task:
    """Train adapters on the base, and merge them into it."""
    save, own, adapters, layout = (
        places.folder / "lora",
        places.own("lora"),
        places.project.lora,
        places.layouts.of("lora"),
    )

    def command() -> list[str]:
        fixed = {
            "hf-path": places.base,
            "data-path": data(places, "lora"),
            "save": save,
            "export": places.export,
            "base-model": places.model_name if places.is_downloaded else None,
            **asdict(adapters),
            **length(places, "lora"),
        }
        return words("lora", own, fixed)

    return Task(
        name="lora",
        command=command,
        settings=settings(own),
        made_from=(*places.base_task, *_sources(places, "lora")),
        files=(*(() if places.is_downloaded else (places.base,)), *corpus_files(places, "lora")),
        is_complete=lambda: (save / FINISHED_FILE).is_file() and (places.export / CONFIG_FILE).is_file(),
        continues=save,
        memory_gib=layout.memory_gib,
        disk_gib=places.layouts.export_gib,
        gpus_per_node=layout.gpus_per_node,
    )


def stage(places: Places, name: str, before: str) -> Task:
    """A stage, which starts from the output of the task `before`; its text decides its command."""
    save, layout, own = places.folder / name, places.layouts.of(name), places.own(name)
    recipe = recipe_of(name, own)

    def command() -> list[str]:
        return words(name, own, _fixed(places, name, before, data(places, name), length(places, name)))

    tokens = expected_tokens(places, name)
    return Task(
        name=name,
        command=command,
        settings=[*layout.flags, *places.trackers, *settings(own)],
        made_from=(before, *_sources(places, name)),
        # It only measures on held-out text.
        decided_by=places.text_tasks if validation(places, name) else (),
        files=(*([find_recipe(recipe)] if recipe else []), *corpus_files(places, name)),
        is_complete=(save / FINISHED_FILE).is_file,
        continues=save,
        minutes=layout.minutes(tokens),
        memory_gib=layout.memory_gib,
        disk_gib=layout.disk_gib(tokens),
        nodes=layout.nodes,
        gpus_per_node=layout.gpus_per_node,
    )


def check_words(places: Places, name: str) -> list[str]:
    """The command `moelpr check` of a stage on the GPUs of the project; its text and model need not be there yet.

    Raises:
        UserError: The project has no GPUs, or some that are unknown.
    """
    if name == "lora":
        raise UserError(f"{places.file.at('method')}--check runs stages on Megatron, which method: lora has none of")
    layout, own, cluster = places.layouts.of(name), places.own(name), _gpus(places)
    before = ["convert", *places.stages][places.stages.index(name)]
    try:
        text = data(places, name), length(places, name)
    except UserError:
        corpora = ["replay"] if name == "stage2" else _codes(places, name)
        text = [str(places.corpus(corpus)) for corpus in corpora], {"train-iters": 1000}
    model = {
        "nnodes": layout.nodes,
        "nproc-per-node": layout.gpus_per_node,
        "gpu": next(name for name, gpu in GPUS.items() if gpu == cluster.gpu),
        "hf-path": places.config_folder(),
        **_experts(places),
        "num-new-tokens": places.project.vocabulary and places.project.vocabulary.new_tokens,
    }
    _, _, *flags = words(name, own, model | _fixed(places, name, before, *text))
    return ["moelpr", "check", *flags, *layout.flags, *settings(own)]


def _fixed(places: Places, stage: str, before: str, data: Sequence[str], length: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a stage that the project decides, without dashes."""
    own = places.own(stage)
    return {
        "recipe": recipe_of(stage, own),
        "pretrained-checkpoint": places.converted if before == "convert" else places.folder / before,
        "data-path": data,
        "save": places.folder / stage,
        **places.decided(stage),
        "validation-data": validation(places, stage),
        **(_STAGE0_FLAGS if stage == "stage0" else {}),
        "mix": "temperature=1" if stage == "sft" and len(places.conversations) > 1 else None,
        **length,
    }


def _gpus(places: Places) -> Cluster:
    if (cluster := places.layouts.cluster) is None or cluster.gpu not in GPUS.values():
        place, found = places.file.at("hardware", "gpu"), "an unknown one" if cluster else "none"
        raise UserError(
            f"{place}--check runs stages as on GPUs, got {found}; set hardware.gpu to one of {', '.join(GPUS)}"
        )
    return cluster


def _sources(places: Places, stage: str) -> list[str]:
    """The tasks that make the text of a stage."""
    if stage == "sft":
        return [f"conversations-{code}" for code in places.conversations]
    if places.project.corpora:
        return []
    return ["replay"] if stage == "stage2" else [f"preprocess-{code}" for code in _codes(places, stage)]


def _codes(places: Places, stage: str) -> Collection[str]:
    """The languages whose corpora a stage reads; stage 2 has one of its own."""
    return {"stage0": places.languages, "stage2": ()}.get(stage, places.blended)


def data(places: Places, stage: str) -> list[str]:
    """The value of a stage's --data-path.

    Raises:
        UserError: The corpora that decide it are not there yet, or the mix does not work with them.
    """
    if stage == "sft":
        return [str(places.chat_corpus(code)) for code in places.conversations]
    if corpora := places.project.corpora:
        return [*map(str, corpora.stage2 if stage == "stage2" else corpora.stage1)]
    if stage == "stage2":
        return [str(places.corpus("replay"))]
    weights = {code: share.weight for code, share in shares(places, tokens_of(places)).items()}
    if stage == "stage0":
        share = _STAGE0_ORIGINAL * (1 - places.project.mix.replay)
        weights |= {code: share / len(places.original) for code in places.original}
    return [word for code, weight in weights.items() for word in (f"{weight:.6g}", str(places.corpus(code)))]


def corpus_files(places: Places, stage: str) -> list[Path]:
    """The files of corpora that the user has made."""
    corpora = places.project.corpora if stage != "sft" else None
    words = (corpora.stage2 if stage == "stage2" else corpora.stage1) if corpora else []
    prefixes = [word for word in words if isinstance(word, str) and not word.replace(".", "").isdigit()]
    return [Path(f"{prefix}.{end}") for prefix in prefixes for end in ("bin", "idx", "lang")]


def length(places: Places, stage: str) -> dict[str, Any]:
    """The flag that says how long a stage trains, unless the user's do."""
    project = places.project
    if stage == "sft" or LENGTH_FLAGS & places.own(stage).keys():  # the recipe of sft has its length
        return {}
    if stage == "stage2":
        assert places.replay is not None
        return {"train-epochs": places.replay.epochs}
    if project.corpora and project.budget.epochs:
        return {"train-epochs": project.budget.epochs}
    total = total_tokens(places, {} if project.corpora else tokens_of(places))
    if stage == "stage0":
        assert project.vocabulary is not None
        return {"train-tokens": project.vocabulary.stage0_tokens or round(_STAGE0_SHARE * total)}
    return {"train-tokens": total}


def expected_tokens(places: Places, stage: str) -> float | None:
    """The tokens of a stage, if they are known."""
    try:
        return length(places, stage).get("train-tokens")
    except UserError:  # the text decides it, which is not tokenized yet
        return total_tokens(places, estimated_tokens(places)) if stage == places.main_stage else None


def validation(places: Places, stage: str) -> list[str] | None:
    """The value of a stage's --validation-data."""
    if places.project.corpora or stage in ("stage0", "sft"):
        return None
    codes = [code for code, language in places.languages.items() if not language.held_out]
    return [f"{code}={places.corpus(f'{code}_validation')}" for code in codes] or None
