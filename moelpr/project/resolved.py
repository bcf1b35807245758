"""A project with what follows from its file: the trainings, folders and corpora that its steps agree on."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from moelpr.data.manifest import Manifest
from moelpr.measure.report.findings import Calibration
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.families.hub import download, is_on_hub
from moelpr.project.file import ProjectFile
from moelpr.project.layout import Layouts
from moelpr.project.project import Language, Way
from moelpr.train.arguments.recipes import read_recipe
from moelpr.train.track.tracking import TrackedRun

PLAN_FILE = "plan.txt"  # the expected time of a project with trackers
# The training that has the budget, and the default recipe of each; lora has none.
MAIN_STAGE: dict[Way, str] = {"moe-lpr": "stage1", "full": "dense", "ffn": "ffn", "lora": "lora"}
MAIN_STAGE |= {"auto": "ffn", "second-ffn": "ffn", "low-rank-ffn": "lora"}
_RECIPES = {"stage0": "paper-stage1", "stage1": "paper-stage1", "stage2": "paper-stage2", "sft": "sft"}
_RECIPES |= {"dense": "paper-dense", "ffn": "paper-dense"}


class ResolvedProject:
    """A languages.yaml with its defaults, which depend on each other.

    Args:
        is_judged: Whether routers that are there are those of the result, not of one that is to be made again.

    Attributes:
        content: What the file says.
        method: What trains, the result's name in tables.
        folder: The folder of all that is made.
        text: The folder of corpora and held-out text; `shared` if several projects may share it, otherwise None.
        converted: The checkpoint that the trainings start from.
        evaluation: The folder of all evaluations.
        is_downloaded: Whether the base is a model of the Hub, which is downloaded to `base`.
        base_task: The task that makes the base, if there is one; `tokenizer_task` likewise.
        languages: All languages by code, expanded ones first; `expanded` and `original` are codes.
        kept: Name → file of more text to keep; `kept_task` is the task that fetches it, if there is one.
        conversations: Codes of the languages that have some.
        main_stage: The step whose training has the budget.
        parts: Its trainings, each with its new languages: one for all, or with an FFN per language one for each.
        replay: The text of stage 2; None without a stage 2.
        stages: All trainings in order.
        trained: The model that the trainings make: the finished one, or what its routers are found for.
        routed: What routers in closed form do; None if they have not been found.
        is_reviewed: Whether review follows a second FFN; None if that is not known yet. `why_reviewed` says why.
        models: Finished models by name, the last of them the project's.
    """

    def __init__(self, file: ProjectFile, is_judged: bool = True) -> None:
        self.file, self.content = file, file.project
        self.method = self.content.way
        self.folder = Path(self.content.output)
        self.text = Path(self.content.text_output or self.folder)
        self.shared = self.text if self.content.text_output else None
        self.converted = self.folder / ("upcycled" if self.method == "moe-lpr" else "converted")
        self.evaluation = self.folder / "evaluation"
        path = self.folder / "hf" / "calibration.json"
        self.routed = Calibration.read(path).findings if is_judged and path.is_file() else None
        self.why_reviewed = self.routed.shortcomings if self.routed and self.method == "auto" else ""
        self.is_reviewed = None if self.routed is None or self.method != "auto" else bool(self.why_reviewed)
        self.models: dict[str, Path] = {self.method: self.folder / "hf"}
        if self.method == "auto":
            self.models = {"second-ffn": self.folder / "hf"}
            self.models |= {"review": self.folder / "review-hf"} if self.is_reviewed else {}
        self.trained = self.folder / "hf"
        if self.content.experts.topk == 1:
            self.trained = self.folder / "ffn-hf"
        elif self.content.languages.kept:
            self.trained = self.folder / "uncalibrated"
        model = self.content.model
        self.is_downloaded = is_on_hub(model)
        self.model_name, _, self.revision = model.partition("@") if self.is_downloaded else (model, "", "")
        self.base = self.text / "base" if self.is_downloaded else Path(model)
        self.base_task = ("download",) if self.is_downloaded else ()
        self.tokenizer = self.text / "tokenizer" if self.content.vocabulary else self.base
        self.tokenizer_task = ("vocabulary",) if self.content.vocabulary else self.base_task
        self.expanded, self.original = (self.content.languages.codes(group) for group in ("expanded", "original"))
        self.languages: dict[str, Language] = dict(self.content.languages)
        self.kept = {
            name: path or str(self.text / "kept" / f"{name}.jsonl")
            for name, path in self.content.languages.kept.items()
        }
        self.kept_task = () if all(self.content.languages.kept.values()) else ("kept",)
        self.conversations = [code for code, language in self.languages.items() if language.conversations]
        self.main_stage = MAIN_STAGE[self.method]
        self.replay = self.content.replay if self.method in ("moe-lpr", "auto") else None
        self.parts = {self.main_stage: self.expanded}
        if self.content.experts.per_language:
            self.parts = {f"{self.main_stage}-{code}": [code] for code in self.expanded}
        self.stages = [*(["stage0"] if self.content.vocabulary else []), *self.parts]
        self.stages += ["stage2"] if self.replay else []
        self.stages += ["sft"] if self.conversations else []

    @property
    def export(self) -> Path:
        """The finished model."""
        return [*self.models.values()][-1]

    def trained_by(self, stage: str) -> Path:
        """The model that a training makes: with an FFN per language, in a folder of its code."""
        return self.trained / stage.partition("-")[2]

    def read_by(self, stage: str) -> list[str]:
        """Codes of the languages that a training reads, expanded ones first."""
        reads_original = self.content.mix.replay or stage == "stage2"
        return [*self.parts.get(stage, self.expanded), *(self.original if reads_original else [])]

    def config_folder(self) -> Path:
        """The folder with config.json of the base: before a model of the Hub is downloaded, in the Hub's cache.

        Raises:
            UserError: The Hub does not have it, or can't be reached.
        """
        record = self.text / "logs" / "download.json"  # another model's, before an edit
        is_other = record.is_file() and f" {self.model_name} " not in record.read_text(encoding="utf-8")
        if not self.is_downloaded or ((self.base / CONFIG_FILE).is_file() and not is_other):
            return self.base
        return download(self.content.model, [CONFIG_FILE], CONFIG_FILE)

    @cached_property
    def layouts(self) -> Layouts:
        return Layouts(self.file, self.config_folder, self.stage_flags)

    @property
    def trackers(self) -> dict[str, Any]:
        """The flags about trackers, without dashes; the steps share one run there. Empty without trackers."""
        flags = {name.replace("_", "-"): value for name, value in asdict(self.content.trackers).items() if value}
        return flags | {"tracker-run": self.folder / TrackedRun.FILE_NAME} if flags else {}

    def own(self, step: str) -> dict[str, Any]:
        """The user's flags for a step, also by the name of one of its tasks."""
        return self.content.steps.get(step.partition("-")[0], {})

    def recipe(self, stage: str) -> Path | None:
        """The recipe of a stage, which the user's flags may name; with `recipe: false` it has none."""
        name = self.own(stage).get("recipe", _RECIPES.get(stage.partition("-")[0]))
        return Path(str(name)) if name else None

    def decided(self, stage: str) -> dict[str, Any]:
        """The flags by which the project decides what a stage trains."""
        if stage != "stage1":
            return {}
        experts = {} if self.replay else {"stage1-experts": "new"}
        return experts | ({"train-new-embeddings": True} if self.content.vocabulary else {})

    def stage_flags(self, stage: str) -> dict[str, Any]:
        """All flags of a stage about what it trains, without dashes: the user's win over the recipe's."""
        recipe = read_recipe(path) if (path := self.recipe(stage)) else {}
        flags = {flag.removeprefix("--"): value for flag, value in recipe.items()}
        return flags | self.decided(stage) | self.own(stage)

    def corpus(self, name: str) -> Path:
        """The prefix of a corpus: of a language, of its held-out text (CODE_validation), or replay."""
        if language := self.languages.get(name.removesuffix("_validation")):
            return self.text / "data" / f"{name}_{language.json_key}_document"
        return self.folder / "data" / f"{name}_text_document"

    def chat_corpus(self, code: str) -> Path:
        """The prefix of the corpus of a language's conversations."""
        return self.folder / "data" / f"{code}_chat_messages_document"

    def manifest(self, name: str) -> Path:
        return Path(f"{self.corpus(name)}.manifest.json")

    def tokens(self, name: str) -> int:
        """The tokens of a corpus.

        Raises:
            UserError: It is not there.
        """
        return Manifest.read_file(self.manifest(name)).tokens

    def held_out(self, code: str) -> str:
        """The text of a language that is evaluated on."""
        return self.languages[code].held_out or str(self.text / "data" / f"{code}_validation.jsonl")

    @property
    def held_out_tasks(self) -> tuple[str, ...]:
        """The tasks that make held-out text."""
        codes = [] if self.content.corpora else [code for code, one in self.languages.items() if not one.held_out]
        return tuple(f"preprocess-{code}" for code in codes)
