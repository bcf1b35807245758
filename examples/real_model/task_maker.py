"""Makes the tasks that the queue consists of: commands, what they read, and their time and memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples import tasks
from examples.downloads import SOURCES
from examples.languages import EXPANDED, GROUPS, ORIGINAL, held_out_files
from examples.real_model import rates, settings, unseen
from examples.real_model.settings import ALL, BASE, SEEDS, TOPK, steps_of
from examples.real_model.text import Facts
from examples.tasks import Words
from moelpr.base.errors import UserError
from moelpr.data.manifest import Manifest
from moelpr.model.checkpoints.chain import checkpoint_chain
from moelpr.project.workflow.task import Task

EXTENDED = "extended-"  # how the names of corpora of the extended tokenizer start
SAVE_INTERVAL = 40  # steps
EVALUATION_TOKENS, UNSEEN_TOKENS = 125_000, 75_000  # per model
# Tokens per second on two cores of a Xeon with AVX-512 and bf16 matrix products.
SPEED = {
    **{"stage0": 180, "stage1": 155, "stage2": 190, "dense": 235, "plain": 130},
    **{"lora": 218, "evaluate": 400},
}
# Memory of all ranks at their peak, which in stage 1 is while a step is saved, and disk space of a run.
MEMORY_GIB = {"stage0": 9.5, "stage1": 9.5, "stage2": 5.0, "dense": 5.5, "plain": 16.5}
DISK_GIB = {"stage0": 0.8, "stage1": 3.4, "stage2": 0.1, "dense": 2.0, "plain": 5.3}

Tags = Iterable[str]


class TaskMaker:
    """A run folder, and a method for each kind of task in it; tags of tasks are the settings that need them."""

    def __init__(
        self,
        run: Path,
        base: Path | None = None,
        tokens: int = settings.TOKENS,
        is_short: bool = False,
        is_plain: bool = False,
    ) -> None:
        """`base`: Hugging Face directory; by default SmolLM2-135M-Instruct, which is downloaded.

        `is_short`: Learning rates aren't searched for, and models are evaluated on `unseen` text only.
        `is_plain`: The base is trained on plain text first, so that no setting improves it by doing that.
        """
        self.run, self.tokens, self.is_short, self.is_plain = run, tokens, is_short, is_plain
        downloaded = (run / "tuned" if is_plain else run) / "base-hf"
        self.given = base or downloaded
        self._is_base_downloaded = self.given == downloaded
        self.base = run / "base-hf" if is_plain else self.given
        self.corpus, self.text, self.data, self.other = run / "corpus", run / "text", run / "data", run / "other"

    def script(self, name: str, tags: Tags, output: Path, minutes: float, **fields: Any) -> Task:
        """Run a script of this folder, which writes `output` into the run folder."""
        words: Words = ["-m", f"examples.real_model.{name}", "--run", self.run, "--overwrite"]
        return tagged(tags, Task(name=name, command=words, is_complete=output.exists, minutes=minutes), **fields)

    def download(self, name: str, output: Path, minutes: float, **fields: Any) -> Task:
        """Run a script of this folder that downloads packages, and writes the folder with the file `output`."""
        run = output.parent.parent
        words: Words = ["-m", f"examples.real_model.{name}", "--run", run, "--overwrite"]
        words += ["--cache", self.run / "downloads"] if run != self.run else []
        task = Task(name=name, command=words, is_complete=output.exists, minutes=minutes)
        return tagged(ALL, task, files=(SOURCES,), memory_gib=2, **fields)

    def preprocess(self, tags: Tags, tokenizer: Path, prefix: str = "") -> list[Task]:
        """A corpus per language group."""
        made_from = ("split", "tokenizer" if prefix else "base")
        found = []
        for group, languages in GROUPS.items():
            files, save = self.train_files(languages).values(), self.data / f"{prefix}{group}"
            found.append(tasks.preprocess(save, files, tokenizer, group, made_from=made_from))
        return [tagged(tags, task, minutes=0.2) for task in found]

    def train_files(self, languages: Iterable[str]) -> dict[str, Path]:
        return {language: self.text / f"train.{language}.jsonl" for language in languages}

    def convert(self, save: Path, tags: Tags, *options: str, made_from: tuple[str, ...] = ("base",)) -> Task:
        task = tasks.convert(save, self.base, *options, "--seed", str(SEEDS[0]), made_from=made_from)
        return tagged(tags, task, minutes=0.5, disk_gib=1.4)

    def evaluate(self, model: str, tags: Tags | None = None, *, is_validation: bool = False) -> Task:
        """Bits per byte and routing of a model on all held-out text, or on the validation part."""
        output = self.run / ("validation" if is_validation else "evaluation")
        users = ALL if model == BASE else settings.users_of_model(model)

        def files() -> dict[str, Path]:
            if is_validation:
                return {language: self.text / f"validation.{language}.jsonl" for language in EXPANDED}
            return held_out_files(self.corpus, Facts.read(self.corpus).kinds)

        def command() -> Words:
            models = {name: settings.model_folder(self.run, self.base, name) for name in (BASE, model)}
            original = [name for name in files() if name.split(".")[0] in ORIGINAL]
            options = ["--original-languages", ",".join(original)] if original else []
            options += ["--dtype", "bfloat16", "--sequence-length", str(settings.SEQUENCE_LENGTH)]
            return tasks.evaluation_words("text", models, files(), output, *options)

        task = Task(
            name=f"evaluate-{model}",
            command=command,
            made_from=("split" if is_validation else "text", *dict.fromkeys(["base", model])),
            is_complete=lambda: rates.bits_per_byte(output, model).keys() >= files().keys(),
        )
        tokens = EVALUATION_TOKENS / (6 if is_validation else 1)
        return tagged(tags or users, task, minutes=0.5 + tokens / SPEED["evaluate"] / 60)

    def evaluate_unseen(self, model: str) -> Task:
        """What a model keeps of what neither training nor replay contains, and what it has learned, at later tokens."""
        output = self.run / unseen.EVALUATION

        def command() -> Words:
            models = {name: settings.model_folder(self.run, self.base, name) for name in (BASE, model)}
            files = unseen.files(self.run)
            options = ["--original-languages", ",".join(name for name in files if not unseen.is_expanded(name))]
            options += f"--dtype bfloat16 --sequence-length 2048 --skip-tokens {unseen.SKIPPED}".split()
            options += ["--max-documents", str(settings.SHORT_DOCUMENTS)] if self.is_short else []
            return tasks.evaluation_words("text", models, files, output, *options)

        task = Task(
            name=f"unseen-{model}",
            command=command,
            made_from=("unseen", *dict.fromkeys(["base", model])),
            is_complete=lambda: rates.bits_per_byte(output, model).keys() >= unseen.files(self.run).keys(),
        )
        minutes = 0.5 + UNSEEN_TOKENS / SPEED["evaluate"] / 60
        return tagged(ALL if model == BASE else settings.users_of_model(model), task, minutes=minutes)

    def number_of_steps(self, share: float) -> int:
        return steps_of(share * self.tokens)

    def blended(self, blend: Mapping[str, float], corpora: str = "") -> Words:
        """--data-path of a blend of text: with weights, unless it is all of one kind."""
        data: Words = [self.data / f"{corpora}{group}_text_document" for group in blend]
        return (
            data if len(blend) == 1 else [x for pair in zip(map(str, blend.values()), data, strict=True) for x in pair]
        )

    def train(
        self,
        model: str,
        stage: str,
        start: Path,
        tags: Tags,
        *,
        options: tuple[str, ...] = (),
        share: float = 1.0,
        blend: Mapping[str, float] | None = None,
        rate: float | None = None,
        highest: float | None = None,
        searched: str = "",
        seed: int = SEEDS[0],
        corpora: str = "",
        is_shorter: bool = False,
        trains_everything: bool = False,
    ) -> Task:
        """A run of one stage; all runs have the same settings, except for these arguments.

        Args:
            model: Name of the run, its task and its folder.
            start: Checkpoint that it starts from, named like its task.
            options: More flags of the trainer.
            share: Its tokens, as a multiple of those of stage 1.
            blend: Language group -> its part of the text; by default that of the stage.
            rate: Highest learning rate of a run that searches for one, which is short and not continued.
            highest: Highest learning rate of another run; by default that of the stage.
            searched: The setting whose search has found the rate; by default it is that of the stage.
            corpora: How the names of the corpora start.
            is_shorter: The extended tokenizer makes fewer tokens of its text, and it takes fewer steps.
            trains_everything: A plain MoE. The ranks share the optimizer and take a sequence at a time, for memory.
        """
        kind, save = "plain" if trains_everything else stage, self.run / model
        ranks = _ranks_of_plain_moe() if trains_everything else 1
        fixed = [*fixed_options(ranks), "--seed", str(seed)]
        fixed += ["--train-everything", "--use-distributed-optimizer"] if trains_everything else []
        fixed += [] if trains_everything or stage == "dense" else ["--save-trained-only"]
        fixed += ["--no-save-optim"] if rate else []
        blend = blend or settings.BLENDS[stage]
        share = settings.SEARCH_SHARE if rate else share
        data = self.blended(blend, corpora)

        def steps() -> int:
            return self.number_of_steps(share * (self.tokens_left() if is_shorter else 1))

        def command() -> Words:
            given = self.best_rate(searched) if searched else rate or highest
            schedule = settings.schedule(steps(), given or settings.STAGE_RATES[stage])
            return tasks.training_words(stage, start, data, save, *schedule, *fixed, *options)

        try:
            expected = steps()
        except UserError:
            expected = self.number_of_steps(share)
        task = Task(
            name=model,
            command=command,
            made_from=(start.name, *(f"preprocess-{corpora}{group}" for group in blend)),
            decided_by=self.searches(searched) if searched else ("preprocess-expanded",) if is_shorter else (),
            environment={"NPROC_PER_NODE": str(ranks)},
            # The last step is there, with the steps whose frozen tensors it needs.
            is_complete=lambda: tasks.is_finished(save) and bool(checkpoint_chain(save)),
            continues=save,
        )
        minutes, disk = 1.5 + minutes_of(kind, expected), 0.3 if rate else DISK_GIB[kind]
        return tagged(tags, task, minutes=minutes, memory_gib=MEMORY_GIB[kind], disk_gib=disk)

    def tokens_left(self) -> float:
        """Tokens of the expanded languages' text after the extension, as a fraction of those before.

        Raises:
            UserError: One of both corpora is missing or damaged.
        """
        tokens = []
        for prefix in (EXTENDED, ""):
            path = self.data / f"{prefix}expanded_text_document"
            if (manifest := Manifest.read(path)) is None:
                mark = self.run / "logs" / f"preprocess-{prefix}expanded.json"
                raise UserError(f"{path} has no manifest; remove {mark} and rerun make results")
            tokens.append(manifest.tokens)
        return tokens[0] / tokens[1]

    def search(self, setting: str, tags: Tags, train: Callable[..., Task]) -> list[Task]:
        """A short run per learning rate; `train` makes it from its name and `rate`."""
        found = []
        for rate in () if self.is_short else settings.RATES[setting]:
            model = rates.search_name(setting, rate)
            found += [train(model, rate=rate), self.evaluate(model, tags, is_validation=True)]
        return found

    def searches(self, setting: str) -> tuple[str, ...]:
        return () if self.is_short else rates.searches(setting)

    def best_rate(self, setting: str) -> float:
        return settings.FOUND_RATES[setting] if self.is_short else rates.best_rate(self.run, setting)


def fixed_options(ranks: int) -> list[str]:
    """The flags that all runs of the trainer have; no saved step but the last is kept."""
    micro_batch = settings.MICRO_BATCH // ranks
    return (
        f"--bf16 --seq-length {settings.SEQUENCE_LENGTH} --global-batch-size {settings.BATCH} --micro-batch-size "
        f"{micro_batch} --weight-decay 0 --adam-beta2 {settings.BETA2} --log-interval 10 --save-interval "
        f"{SAVE_INTERVAL} --save-retain-interval {SAVE_INTERVAL * 1000}"
    ).split()


def moe_options(name: str, topk: int = TOPK) -> list[str]:
    copies = topk if name == "copies" else 1
    options = f"--num-new-experts {settings.NUM_NEW_EXPERTS} --topk {topk} --original-copies {copies}".split()
    return options + (["--new-experts", "random"] if name == "random" else [])


def tagged(tags: Tags, task: Task, **fields: Any) -> Task:
    return replace(task, tags=frozenset(tags), **fields)


def minutes_of(kind: str, steps: int) -> float:
    return steps * settings.STEP_TOKENS / SPEED[kind] / 60


def _ranks_of_plain_moe() -> int:
    """Two, unless the machine has a single GPU."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2
