"""Where a project's outputs are, and what of it several steps need."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from moelpr.data.manifest import Manifest
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.families.hub import download
from moelpr.project.layout import Layouts
from moelpr.project.project import Language
from moelpr.project.reading import HUB_NAME, ProjectFile
from moelpr.project.steps import MAIN_STAGE, stage_flags
from moelpr.train.arguments.recipes import recipe_argv
from moelpr.train.track.tracking import TrackedRun

PLAN_FILE = "plan.txt"  # what a project with trackers was expected to take


class Places:
    """The files and folders of a project.

    Attributes:
        is_downloaded: Whether the base is a model of the Hub, which is downloaded into the project's folder.
        method: What trains, the result's name in tables.
        text: The folder of corpora and held-out text, which several projects may share.
        stages: The trainings in order; `main_stage` has the budget, and reads the text of the languages `blended`.
        expanded: Codes of the expanded languages; `original` likewise.
        conversations: Codes of the languages that have some.
        exported: What export writes: `export`, or what calibration makes it of.
        languages: All languages by code, expanded ones first.
    """

    def __init__(self, file: ProjectFile) -> None:
        self.file, self.project = file, file.project
        self.method = self.project.method
        self.folder = Path(self.project.output)
        self.text = Path(self.project.text_output or self.folder)
        model = self.project.model
        self.is_downloaded = not Path(model).exists() and HUB_NAME.fullmatch(model) is not None
        self.model_name, _, self.revision = model.partition("@") if self.is_downloaded else (model, "", "")
        self.base = self.text / "base" if self.is_downloaded else Path(model)
        self.expanded, self.original = (self.project.languages.codes(group) for group in ("expanded", "original"))
        self.languages: dict[str, Language] = dict(self.project.languages)
        self.blended = [*self.expanded, *(self.original if self.project.mix.replay else [])]
        self.tokenizer = self.text / "tokenizer" if self.project.vocabulary else self.base
        is_moe = self.method == "moe-lpr"
        self.converted = self.folder / ("upcycled" if is_moe else "converted")
        self.export, self.chat = self.folder / "hf", self.folder / "chat"
        is_calibrated = bool(self.project.languages.kept)
        self.exported = self.folder / "uncalibrated" if is_calibrated else self.export
        self.last_model_step = "calibrate" if is_calibrated else "lora" if self.method == "lora" else "export"
        self.evaluation = self.folder / "evaluation"
        self.conversations = [code for code, language in self.languages.items() if language.conversations]
        self.main_stage = MAIN_STAGE[self.method]
        self.replay = self.project.replay if is_moe else None
        self.stages = [*(["stage0"] if self.project.vocabulary else []), self.main_stage]
        self.stages += ["stage2"] if self.replay else []
        self.stages += ["sft"] if self.conversations else []

    def config_folder(self) -> Path:
        """The folder with config.json of the base: before a model of the Hub is downloaded, in the Hub's cache.

        Raises:
            UserError: The Hub does not have it, or can't be reached.
        """
        if not self.is_downloaded or (self.base / CONFIG_FILE).is_file():
            return self.base
        return download(self.model_name, self.revision or None, [CONFIG_FILE], CONFIG_FILE)

    @cached_property
    def layouts(self) -> Layouts:
        return Layouts(
            self.file, self.config_folder, lambda stage: stage_flags(stage, self.decided(stage) | self.own(stage))
        )

    @property
    def trackers(self) -> list[str]:
        """The flags about trackers; the steps share one run there. Empty without trackers."""
        flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(self.project.trackers).items() if value}
        return recipe_argv(flags | {"--tracker-run": str(self.folder / TrackedRun.FILE_NAME)}) if flags else []

    @property
    def base_task(self) -> tuple[str, ...]:
        """The task that makes the base, if there is one."""
        return ("download",) if self.is_downloaded else ()

    @property
    def text_tasks(self) -> tuple[str, ...]:
        """The tasks that make held-out text."""
        made = [] if self.project.corpora else [code for code, one in self.languages.items() if not one.held_out]
        return tuple(f"preprocess-{code}" for code in made)

    def own(self, step: str) -> dict[str, Any]:
        """The user's flags for a step."""
        return self.project.steps.get(step, {})

    def decided(self, stage: str) -> dict[str, Any]:
        """The flags by which the project decides what a stage trains."""
        if stage != "stage1":
            return {}
        experts = {} if self.replay else {"stage1-experts": "new"}
        return experts | ({"train-new-embeddings": True} if self.project.vocabulary else {})

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
