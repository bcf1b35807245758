"""The training steps: upcycling and the stages, with as many tokens as the budget and the text allow."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import FINISHED_FILE
from moelpr.model.model_spec import FILE_NAME as SPEC_FILE
from moelpr.plan.gpus import GPUS
from moelpr.project.budget import LENGTH_FLAGS, shares, tokens_of, tokens_or_estimates, total_tokens
from moelpr.project.layout import TWINS
from moelpr.project.project import Way
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.step import AUTO, LORA, METHODS, Step, has_model, step
from moelpr.project.workflow.task import Task
from moelpr.train.arguments.recipes import find_recipe, recipe_argv

# New rows also learn to be unlikely in the original languages: one part in five (docs/vocabulary.md).
_STAGE0_SHARE, _STAGE0_ORIGINAL = 0.1, 0.25
# docs/vocabulary.md; weights of experts and routers do not train there.
_STAGE0_FLAGS = {"lr": 1e-3, "balance-loss-coeff": 0.0}
_STAGE_SPEED = (
    "nproc-per-node tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size "
    "expert-tensor-parallel-size sequence-parallel recompute-granularity recompute-method recompute-num-layers "
    "micro-batch-size log-interval save-interval save-retain-interval num-workers overlap-grad-reduce "
    "overlap-param-gather eval-interval num-virtual-stages-per-pipeline-rank decoder-first-pipeline-num-layers "
    "decoder-last-pipeline-num-layers async-save manual-gc manual-gc-interval ckpt-fully-parallel-load "
    "ckpt-assume-constant-structure gpu-sniff-test-interval"
)


@step("convert", "model convert", reserved="hf-path save extended-tokenizer dense overwrite", methods=METHODS - LORA)
def convert(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Upcycle the base; for a method without experts, convert it as it is."""
    flags: dict[str, Any] = {
        "hf-path": project.base,
        "save": project.converted,
        "extended-tokenizer": project.tokenizer if project.content.vocabulary else None,
        **(_experts(project) or {"dense": True}),
        "overwrite": True,
    }
    yield step.task(
        project,
        flags,
        made_from=project.tokenizer_task,
        files=() if project.is_downloaded else (project.base,),
        is_complete=(project.converted / SPEC_FILE).is_file,
        disk_gib=project.layouts.export_gib,
    )


@step("twins", "model convert", reserved="hf-path save ffns-of num-new-experts topk overwrite", methods=AUTO)
def twins(step: Step, project: ResolvedProject) -> Iterator[Task]:
    """Put base and second FFN together so that routers can train: both have as many places as a token chooses."""
    save = project.folder / step.name
    flags: dict[str, Any] = {"hf-path": project.base, "save": save, "ffns-of": project.trained, **_flags_of(TWINS)}
    yield step.task(
        project,
        flags | {"overwrite": True},
        made_from=("export", *project.base_task),
        files=() if project.is_downloaded else (project.base,),
        is_complete=(save / SPEC_FILE).is_file,
        disk_gib=2 * project.layouts.export_gib,
    )


def _flags_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in settings.items()}


def _experts(project: ResolvedProject) -> dict[str, Any]:
    """How the model grows, as flags without dashes; empty if it does not."""
    experts = project.content.experts
    if project.method != "moe-lpr":
        return {}
    return {
        "num-new-experts": project.layouts.num_new_experts,
        "topk": experts.topk,
        "original-copies": experts.copies,
        "moe-every-k-layers": experts.every_k_layers,
    }


def _each(train: Callable[[Step, ResolvedProject, str], Task]) -> Callable[[Step, ResolvedProject], Iterator[Task]]:
    """The trainings of a step: one, or with an FFN per language one of each language."""
    return lambda step, project: (
        train(step, project, stage) for stage in project.stages if stage.partition("-")[0] == step.name
    )


def _stage(name: str, *methods: Way) -> Step:
    """A stage on Megatron, which starts from the output of the one before; its text decides its command."""
    reserved = "pretrained-checkpoint data-path save load"
    return step(name, f"train {name}", reserved=reserved, speed=_STAGE_SPEED, methods=frozenset(methods))(_train)


@_each
def _train(step: Step, project: ResolvedProject, name: str) -> Task:
    save, layout, recipe = project.folder / name, project.layouts.of(step.name), project.recipe(name)
    tokens, trackers = expected_tokens(project, name), project.trackers
    if name != step.name:  # trainings at one time have a run each
        trackers.pop("tracker-run", None)
    return step.task(
        project,
        lambda: _flags(project, name, data(project, name), length(project, name)),
        name=name,
        settings=[*layout.flags, *recipe_argv({f"--{flag}": value for flag, value in trackers.items()})],
        made_from=(_before(project, name), *_sources(project, name)),
        # It only measures on held-out text.
        decided_by=project.held_out_tasks if validation(project, name) else (),
        files=(*([find_recipe(recipe)] if recipe else []), *corpus_files(project, name)),
        is_complete=(save / FINISHED_FILE).is_file,
        continues=save,
        minutes=layout.minutes(tokens),
        memory_gib=layout.memory_gib,
        disk_gib=layout.disk_gib(tokens),
        nodes=layout.nodes,
        gpus_per_node=layout.gpus_per_node,
    )


STAGES = [_stage("stage0", "moe-lpr"), _stage("stage1", "moe-lpr"), _stage("stage2", "moe-lpr", "auto")]
STAGES += [_stage("sft", "moe-lpr"), _stage("dense", "full"), _stage("ffn", "ffn", "auto", "second-ffn")]


@step(
    "lora",
    "train lora",
    reserved="hf-path data-path save export rank alpha modules",
    speed="micro-batch-size save-interval",
    methods=LORA,
)
@_each
def lora(step: Step, project: ResolvedProject, name: str) -> Task:
    """Train adapters on the base, and merge them into it."""
    save, layout, rank = project.folder / name, project.layouts.of(step.name), project.content.experts.rank
    export = project.trained_by(name)

    def flags() -> dict[str, Any]:
        return {
            "hf-path": project.base,
            "data-path": data(project, name),
            "save": save,
            "export": export,
            "base-model": project.model_name if project.is_downloaded else None,
            **asdict(project.content.lora),
            **({"rank": rank, "modules": project.layouts.ffn_modules} if rank else {}),
            **length(project, name),
        }

    return step.task(
        project,
        flags,
        name=name,
        made_from=(*project.base_task, *_sources(project, name)),
        files=(*(() if project.is_downloaded else (project.base,)), *corpus_files(project, name)),
        is_complete=lambda: (save / FINISHED_FILE).is_file() and has_model(export),
        model=export,
        is_result=export == project.export,
        continues=save,
        memory_gib=layout.memory_gib,
        disk_gib=project.layouts.export_gib,
        gpus_per_node=layout.gpus_per_node,
    )


def check_words(project: ResolvedProject, name: str) -> list[str]:
    """The command `moelpr check` of a stage on the GPUs of the project; its text and model need not be there yet.

    Raises:
        UserError: The project has no GPUs, or some that are unknown.
    """
    if project.main_stage == "lora":
        raise UserError(f"{project.file.at('method')}--check runs stages on Megatron, which method: lora has none of")
    layout, cluster = project.layouts.of(name), project.layouts.cluster
    gpu = next((kind for kind, gpu in GPUS.items() if cluster and gpu == cluster.gpu), None)
    if gpu is None:
        place = project.file.at("hardware", "gpu")
        raise UserError(f"{place}--check runs stages as on GPUs; set hardware.gpu to one of {', '.join(GPUS)}")
    try:
        text = data(project, name), length(project, name)
    except UserError:
        corpora = ["replay"] if name == "stage2" else _codes(project, name)
        text = [str(project.corpus(corpus)) for corpus in corpora], {"train-iters": 1000}
    model = {
        "nnodes": layout.nodes,
        "nproc-per-node": layout.gpus_per_node,
        "gpu": gpu,
        "hf-path": project.config_folder(),
        **(_flags_of(TWINS) if name == "stage2" and project.method == "auto" else _experts(project)),
        "num-new-tokens": project.content.vocabulary and project.content.vocabulary.new_tokens,
    }
    stage = next(stage for stage in STAGES if stage.name == name.partition("-")[0])
    _, _, *words = stage.words(project, model | _flags(project, name, *text))
    return ["moelpr", "check", *words, *layout.flags, *stage.speed_words(project)]


def _before(project: ResolvedProject, stage: str) -> str:
    """The task from whose output a stage starts."""
    if project.method == "auto" and stage == "stage2":
        return "twins"
    return ["convert", *project.stages][project.stages.index([*project.parts][0] if stage in project.parts else stage)]


def _flags(project: ResolvedProject, stage: str, data: Sequence[str], length: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a stage that the project decides, without dashes."""
    before = _before(project, stage)
    return {
        "recipe": project.recipe(stage),
        "pretrained-checkpoint": project.converted if before == "convert" else project.folder / before,
        "data-path": data,
        "save": project.folder / stage,
        **project.decided(stage),
        "validation-data": validation(project, stage),
        "early-stop-patience": project.content.budget.patience if stage in project.parts else None,
        **(_STAGE0_FLAGS if stage == "stage0" else {}),
        "mix": "temperature=1" if stage == "sft" and len(project.conversations) > 1 else None,
        **length,
    }


def _sources(project: ResolvedProject, stage: str) -> list[str]:
    """The tasks that make the text of a stage."""
    if stage == "sft":
        return [f"conversations-{code}" for code in project.conversations]
    if project.content.corpora:
        return []
    return ["replay"] if stage == "stage2" else [f"preprocess-{code}" for code in _codes(project, stage)]


def _codes(project: ResolvedProject, stage: str) -> Collection[str]:
    """The languages whose corpora a stage reads; stage 2 has one of its own."""
    return {"stage0": project.languages, "stage2": ()}.get(stage, project.read_by(stage))


def data(project: ResolvedProject, stage: str) -> list[str]:
    """The value of a stage's --data-path.

    Raises:
        UserError: The corpora that decide it are not there yet, or the mix does not work with them.
    """
    if stage == "sft":
        return [str(project.chat_corpus(code)) for code in project.conversations]
    if words := _made_corpora(project, stage):
        return [*map(str, words)]
    if stage == "stage2":
        return [str(project.corpus("replay"))]
    weights = {code: share.weight for code, share in shares(project, tokens_of(project, stage)).items()}
    if stage == "stage0":
        share = _STAGE0_ORIGINAL * (1 - project.content.mix.replay)
        weights |= {code: share / len(project.original) for code in project.original}
    return [word for code, weight in weights.items() for word in (f"{weight:.6g}", str(project.corpus(code)))]


def _made_corpora(project: ResolvedProject, stage: str) -> list[str | int | float]:
    """Prefixes, or weights and prefixes, of the corpora of a stage that the user has made."""
    if (corpora := project.content.corpora) is None or stage == "sft":
        return []
    return corpora.stage2 if stage == "stage2" else corpora.stage1


def corpus_files(project: ResolvedProject, stage: str) -> list[Path]:
    """The files of corpora that the user has made."""
    words = _made_corpora(project, stage)
    prefixes = [word for word in words if isinstance(word, str) and not word.replace(".", "").isdigit()]
    return [Path(f"{prefix}.{end}") for prefix in prefixes for end in ("bin", "idx", "lang")]


def length(project: ResolvedProject, stage: str) -> dict[str, Any]:
    """The flag that says how long a stage trains, unless the user's do."""
    content = project.content
    if stage == "sft" or LENGTH_FLAGS & project.own(stage).keys():  # the recipe of sft has its length
        return {}
    if stage == "stage2":
        assert project.replay is not None
        return {"train-epochs": project.replay.epochs}
    if content.corpora and content.budget.epochs:
        return {"train-epochs": content.budget.epochs}
    total = total_tokens(project, {} if content.corpora else tokens_of(project, stage))
    if stage == "stage0":
        assert content.vocabulary is not None
        return {"train-tokens": content.vocabulary.stage0_tokens or round(_STAGE0_SHARE * total)}
    return {"train-tokens": total}


def expected_tokens(project: ResolvedProject, stage: str) -> float | None:
    """The tokens of a stage, if they are known."""
    try:
        return length(project, stage).get("train-tokens")
    except UserError:  # the text decides it, which is not tokenized yet
        return total_tokens(project, tokens_or_estimates(project, stage)[0]) if stage in project.parts else None


def validation(project: ResolvedProject, stage: str) -> list[str] | None:
    """The value of a stage's --validation-data."""
    if project.content.corpora or stage in ("stage0", "sft"):
        return None
    read = [*project.parts.get(stage, project.expanded), *project.original]
    codes = [code for code in read if not project.languages[code].held_out]
    return [f"{code}={project.corpus(f'{code}_validation')}" for code in codes] or None
