"""The tasks of the queue in their order: a believable page early, further seeds last."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from examples import tasks
from examples.downloads import SOURCES
from examples.languages import EXPANDED, GROUPS, LANGUAGES, ORIGINAL, held_out_files
from examples.other_text import SOURCES as OTHER_SOURCES
from examples.real_model import rates, settings, unseen
from examples.real_model.settings import ALL, BASE, SEEDS, SETTINGS, TOPK, VOCABULARY_START, steps_of
from examples.real_model.text import Facts
from examples.tasks import Words
from moelpr.checkpoints.chain import checkpoint_chain
from moelpr.data.manifest import Manifest
from moelpr.process.errors import UserError
from moelpr.workflow.task import Task
from moelpr.workflow.workflow import Workflow

EXTENDED = "extended-"  # how the names of corpora of the extended tokenizer start
PROMPTS = 3  # per language
# Models that write continuations -> the task that writes each for transformers; in a short queue, others.
CONTINUED = {BASE: "base", "copies-seed-1": "export-copies-seed-1", "full": "export-full", "lora": "lora"}
SHORT_CONTINUED = {
    BASE: "base",
    settings.LONG_CALIBRATED: settings.LONG_CALIBRATED,
    settings.HALFWAY_OF: f"export-{settings.HALFWAY_OF}",
}
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

DOWNLOADED: dict[str, Any] = {"files": (SOURCES,), "memory_gib": 2}  # what scripts that download need

Tags = Iterable[str]


class Queue:
    """All tasks of a run folder; their tags are the settings that need them."""

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

    def tasks(self) -> list[Task]:
        """All tasks, in the order in which they run."""
        first, rest = SEEDS[0], () if self.is_short else SEEDS[1:]
        search_stage1 = partial(self._train, stage="stage1", start=self.run / "upcycled-copies", tags={"copies"})
        found = [
            *self._text(),
            self._evaluate(BASE),
            *self._stage1("copies"),
            *self._stage2("copies", first),
            *self._full(),
            *self._lora("lora"),
            *(() if self.is_short else (*self._continuations(), self._wrong_language())),
            *self._stage1("one-copy"),
            *self._stage2("one-copy", first),
            *self._stage2("no-lpr", first),
            *self._stage1("random"),
            *self._stage2("random", first),
            *self._stage2("reference", first),
            *self._plain(),
            *self._vocabulary(),
            *(task for seed in rest for name in ("copies", "one-copy", "no-lpr") for task in self._stage2(name, seed)),
            *(task for seed in rest for task in self._stage2("reference", seed)),
            *self._search("copies", {"copies"}, search_stage1),
            *(task for name, times in settings.MORE_TEXT.items() for task in self._more_text(name, times)),
            *self._replay(),
            *self._lora(settings.LORA_16, rank=16),
            *self._rivals(),
            *([self._wrong_language()] if self.is_short else ()),
        ]
        found = [each for task in found for each in self._with_unseen(task)]
        if self._is_base_downloaded:
            return found
        return [replace(task, files=(*task.files, self.given)) if "base" in task.made_from else task for task in found]

    def _with_unseen(self, task: Task) -> list[Task]:
        """The evaluation on unseen text next to that on held-out text, or alone if the queue is short."""
        model = task.name.removeprefix("evaluate-")
        if model == task.name or model not in settings.UNSEEN:
            return [task]
        return [*([] if self.is_short else [task]), self._evaluate_unseen(model)]

    def _text(self) -> list[Task]:
        """Base and text, the validation part and prompts, and one corpus per language group."""
        base = self._script("base", ALL, self.given / "config.json", 1, self.given.parent, **DOWNLOADED, disk_gib=1)
        return [
            *([replace(base, name="tuned" if self.is_plain else "base")] if self._is_base_downloaded else []),
            self._script("text", ALL, self.corpus / Facts.FILE_NAME, 3, **DOWNLOADED, disk_gib=0.3),
            *(self._plain_base() if self.is_plain else []),
            self._script("split", ALL, self.text, 0.2, made_from=("text",)),
            *self._preprocess(ALL, self.base),
            *(self._written(name, *options) for name, options in unseen.WRITTEN.items()),
            self._script("unseen", ALL, self.run / unseen.FOLDER, 0.3, made_from=("text",)),
        ]

    def _plain_base(self) -> list[Task]:
        """The base after training on plain text, which `given` becomes."""
        text, start, trained = self.run / "plain-text", self.run / "tuned-dense", self.run / "plain-base"
        of_given = {"made_from": ("tuned",)} if self._is_base_downloaded else {"files": (self.given,)}
        corpus = tasks.preprocess(self.data / "plain", [text / "*.jsonl"], self.given, "original", made_from=())
        corpus, convert = (
            replace(task, **of_given) for task in (corpus, tasks.convert(start, self.given, "--dense", made_from=()))
        )
        size: dict[str, Any] = {"share": settings.PLAIN_SHARE, "highest": settings.FOUND_RATES["full"]}
        train = self._train(trained.name, "dense", start, ALL, blend={"plain": 1}, **size)
        return [
            self._script("plain_text", ALL, text, 0.2, made_from=("text",)),
            _tagged(ALL, replace(corpus, made_from=("plain_text", *corpus.made_from)), minutes=0.2),
            _tagged(ALL, convert, disk_gib=1.4),
            train,
            _tagged(ALL, tasks.export(trained, "base"), disk_gib=1),
        ]

    def _written(self, name: str, *options: str) -> Task:
        """Text that the base writes."""
        words: Words = ["-m", "data_tools.generate_text", "--model", self.base, "--output", self.run / name]
        words += [*options, "--temperature", "1", "--top-p", "1", "--dtype", "bfloat16", "--overwrite"]
        is_complete = (self.run / name / "generated.manifest.json").is_file
        task = Task(name=name, command=words, made_from=("base",), is_complete=is_complete)
        return _tagged(ALL, task, files=(unseen.REQUESTS,), minutes=1.5)

    def _script(
        self, name: str, tags: Tags, output: Path, minutes: float, folder: Path | None = None, **fields: Any
    ) -> Task:
        """Run a script of this folder, which writes `output` into the folder of the queue, or another."""
        words: Words = ["-m", f"examples.real_model.{name}", "--run", folder or self.run, "--overwrite"]
        words += ["--cache", self.run / "downloads"] if folder not in (None, self.run) else []
        task = Task(name=name, command=words, is_complete=output.exists, minutes=minutes)
        return _tagged(tags, task, **fields)

    def _preprocess(self, tags: Tags, tokenizer: Path, prefix: str = "") -> list[Task]:
        """A corpus per language group."""
        made_from = ("split", "tokenizer" if prefix else "base")
        found = []
        for group, languages in GROUPS.items():
            files, save = self._train_files(languages).values(), self.data / f"{prefix}{group}"
            found.append(tasks.preprocess(save, files, tokenizer, group, made_from=made_from))
        return [_tagged(tags, task, minutes=0.2) for task in found]

    def _train_files(self, languages: Iterable[str]) -> dict[str, Path]:
        return {language: self.text / f"train.{language}.jsonl" for language in languages}

    def _stage1(self, name: str) -> list[Task]:
        """Upcycling and stage 1, for all settings that start from it."""
        run = settings.STAGE1_OF[name]
        start = self.run / f"upcycled-{name}"
        users = {setting.name for setting in SETTINGS.values() if run in (setting.name, *setting.before)}
        upcycled_for = users | {"one-copy": {"plain"}, "copies": {*settings.MORE_TEXT}}.get(name, set())
        upcycled_for |= settings.users_of(start.name)
        found = [self._convert(start, upcycled_for, *moe_options(name)), self._train(run, "stage1", start, users)]
        return [*found, *([self._evaluate(run)] if run in SETTINGS else [])]

    def _stage2(self, name: str, seed: int, times: int = 1) -> list[Task]:
        """Review; `times` as many tokens as in the other settings."""
        setting, share = SETTINGS[name], times * settings.REVIEW_SHARE
        options = {"no-lpr": ("--lpr-loss-coeff", "0"), "reference": ("--lpr-loss", "reference")}.get(name, ())
        model, start = setting.models[SEEDS.index(seed)], self.run / setting.before[-1]
        train = self._train(model, "stage2", start, {name}, options=options, share=share, seed=seed)
        return [train, self._evaluate(model)]

    def _plain(self) -> list[Task]:
        """Stage 1 with everything trained."""
        start = self.run / "upcycled-one-copy"
        train = self._train("plain", "stage1", start, {"plain"}, trains_everything=True)
        return [train, self._evaluate("plain")]

    def _more_text(self, name: str, times: int) -> list[Task]:
        """Both stages of MoE-LPR with K copies and more tokens."""
        (stage1,) = SETTINGS[name].before
        train = self._train(stage1, "stage1", self.run / "upcycled-copies", {name}, share=times)
        return [train, *self._stage2(name, SEEDS[0], times)]

    def _replay(self) -> list[Task]:
        """Full fine-tuning at the rate that its search found, with the text of both stages of MoE-LPR."""
        name, share = settings.REPLAY, 1 + settings.REVIEW_SHARE
        text: dict[str, Any] = {"share": share, "blend": settings.REPLAY_BLEND}
        train = self._train(name, "dense", self.run / "dense", {name}, searched="full", **text)
        return [train, self._evaluate(name)]

    def _rivals(self) -> list[Task]:
        """The settings of the table, and the kept text that some of them have in review."""
        users = {setting.name for setting in settings.RIVALS if setting.training and "kept" in setting.training.blend}
        pack: Words = ["-m", "examples.other_text", "--output", self.other, "--cache", self.run / "downloads"]
        pack += ["--without", ",".join(unseen.LANGUAGES), "--overwrite"]
        other = Task(name="other", command=pack, is_complete=(self.other / "pack.manifest.json").is_file)
        options = ("--expanded-languages", ",".join(EXPANDED))
        kept = tasks.preprocess(
            self.data / "kept", [self.other / "*.jsonl"], self.base, "kept", *options, made_from=("other", "base")
        )
        needs_other = users | {*settings.CALIBRATED}
        found = [_tagged(needs_other, other, files=(OTHER_SOURCES,)), _tagged(users, kept), *self._written_replay()]
        for setting in settings.RIVALS:
            users = settings.users_of(setting.name)
            if (row := setting.training) and row.stage in ("lora", "ffn"):
                found += [self._adapted(setting.name, row), self._evaluate(setting.name)]
            elif row:
                start, options = self.run / row.start, row.options
                text: dict[str, Any] = {"share": row.share, "blend": row.blend, "highest": row.rate, "seed": row.seed}
                train = self._train(setting.name, row.stage, start, users, options=options, **text)
                found += [train, self._evaluate(setting.name)]
        return [*found, *self._means()]

    def _written_replay(self) -> list[Task]:
        """Replay text that the base writes from its start token, as those have who have none."""
        name = settings.WRITTEN_REPLAY
        users = {setting.name for setting in settings.RIVALS if setting.training and name in setting.training.blend}
        tokens_per_document = 96  # about; at most 128
        documents = math.ceil(self.tokens * (1 + settings.REVIEW_SHARE) * 0.1 / tokens_per_document)
        options = f"--languages und --documents {documents} --batch-size 48 --max-tokens 128 --seed 2".split()
        write = _tagged(users, self._written(name, *options))
        made_from, files = (name, "base"), [self.run / name / "*.jsonl"]
        corpus = tasks.preprocess(self.data / name, files, self.base, "original", made_from=made_from)
        return [write, _tagged(users, corpus, minutes=0.2)]

    def _adapted(self, name: str, row: settings.Training) -> Task:
        """Training by peft or of the FFNs, as the table says."""
        assert row.rate is not None
        steps, hf, options = self._steps(row.share), self.run / f"{name}-hf", ("--rank", "16")
        words: Words = ["-m", "examples.real_model.lora", "--base", self.base, "--run", self.run / name]
        words += ["--data-path", *self._blended(row.blend), "--save", hf, "--train-iters", str(steps)]
        words += [
            "--seed",
            str(row.seed),
            *(("--only-ffn",) if row.stage == "ffn" else options),
            "--lr",
            f"{row.rate:g}",
        ]
        task = Task(
            name=name,
            command=words,
            made_from=("base", *(f"preprocess-{group}" for group in row.blend)),
            is_complete=(hf / "config.json").is_file,
            continues=self.run / name,
        )
        return _tagged(settings.users_of(name), task, minutes=1 + _minutes("lora", steps), memory_gib=8, disk_gib=1.5)

    def _means(self) -> list[Task]:
        """Means of the base's weights and those of a fine-tuned model."""
        of = settings.HALFWAY_OF
        found = [_tagged({*settings.MEANS, of}, tasks.export(self.run / of), disk_gib=0.6)]
        for name, share in settings.MEANS.items():
            save = self.run / f"{name}-hf"
            words: Words = ["-m", "examples.real_model.halfway", self.base, self.run / f"{of}-hf", "--save", save]
            made_from, is_complete = ("base", f"export-{of}"), (save / "config.json").is_file
            words += ["--share", f"{share:g}"]
            task = Task(name=name, command=words, made_from=made_from, is_complete=is_complete)
            found += [_tagged({name}, task, disk_gib=0.6), self._evaluate(name)]
        for name, share in settings.INTERPOLATED.items():
            task = tasks.export(self.run / "new", name, "--interpolate-experts", f"{share:g}")
            found += [_tagged({name}, task, disk_gib=1.2), self._evaluate(name)]
        return [*found, *(task for name in settings.CALIBRATED for task in self._calibrated(name))]

    def _calibrated(self, name: str) -> list[Task]:
        """An export with calibrated routers; kept text is that of the training, and in other languages."""
        run, save = settings.CALIBRATED[name], self.run / f"{name}-hf"
        export = tasks.export(self.run / run)
        words: Words = ["-m", "moelpr", "calibrate", "--model", self.run / f"{run}-hf", "--base", self.base]
        words += ["--expanded-languages", ",".join(EXPANDED), "--dtype", "bfloat16", "--save", save, "--overwrite"]
        words += settings.CALIBRATE_OPTIONS.get(name, ())
        files = self._train_files(LANGUAGES)

        def command() -> Words:
            kept = {path.stem: path for path in sorted(self.other.glob("*.jsonl"))}
            return [*words, *(word for text, path in (files | kept).items() for word in ("--data", f"{text}={path}"))]

        made_from, is_complete = ("base", export.name, "split", "other"), (save / "config.json").is_file
        task = Task(name=name, command=command, made_from=made_from, is_complete=is_complete, minutes=2)
        is_made = export.name in CONTINUED.values() and not self.is_short  # for its continuations
        is_made |= name != next(other for other in settings.CALIBRATED if settings.CALIBRATED[other] == run)
        found = [] if is_made else [_tagged(_calibrated_of(run), export, disk_gib=1.2)]
        return [*found, _tagged({name}, task, disk_gib=1.2), self._evaluate(name)]

    def _blended(self, blend: Mapping[str, float], corpora: str = "") -> Words:
        """--data-path of a blend of text: with weights, unless it is all of one kind."""
        data: Words = [self.data / f"{corpora}{group}_text_document" for group in blend]
        return (
            data if len(blend) == 1 else [x for pair in zip(map(str, blend.values()), data, strict=True) for x in pair]
        )

    def _vocabulary(self) -> list[Task]:
        """New tokens: tokenizer, corpora and model; then three stages for as much text, and for as many tokens."""
        users, tokenizer, start = settings.VOCABULARY, self.run / "tokenizer", self.run / VOCABULARY_START
        new_tokens = ["--num-new-tokens", str(settings.NUM_NEW_TOKENS)]
        extend: Words = ["data_tools/extend_tokenizer.py", "--tokenizer", self.base, *new_tokens]
        for flag, languages in (("--input", EXPANDED), ("--original", ORIGINAL)):
            extend += [flag, *(f"{x}={path}" for x, path in self._train_files(languages).items())]
        extend += ["--save", tokenizer, "--overwrite"]
        made_from = ("base", "split")
        options = (*moe_options("copies"), "--extended-tokenizer", str(tokenizer))
        found = [
            _tagged(users, Task(name="tokenizer", command=extend, made_from=made_from, is_complete=tokenizer.is_dir)),
            *self._preprocess(users, tokenizer, EXTENDED),
            self._convert(start, users, *options, made_from=("base", "tokenizer")),
            self._evaluate(VOCABULARY_START),
        ]
        for name in (settings.SAME_BYTES, settings.SAME_TOKENS):
            found += self._stages_of_vocabulary(name, start)
        return found

    def _stages_of_vocabulary(self, name: str, start: Path) -> list[Task]:
        """Three stages with new tokens; SAME_BYTES takes as many steps as its tokens need."""
        stage0, stage1 = settings.VOCABULARY[name].before
        share0, is_shorter = settings.STAGE0_SHARE, name == settings.SAME_BYTES
        train = partial(self._train, tags={name}, corpora=EXTENDED)
        trained = ("--train-new-embeddings",)
        return [
            train(stage0, "stage0", start, share=share0, is_shorter=is_shorter),
            train(stage1, "stage1", self.run / stage0, share=1 - share0, is_shorter=is_shorter, options=trained),
            train(name, "stage2", self.run / stage1, share=settings.REVIEW_SHARE),
            self._evaluate(name),
        ]

    def _tokens_left(self) -> float:
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

    def _full(self) -> list[Task]:
        """Full fine-tuning at the best rate."""
        users, start = {"full", settings.REPLAY}, self.run / "dense"
        best = self._train("full", "dense", start, {"full"}, searched="full")
        search = self._search("full", users, partial(self._train, stage="dense", start=start, tags=users))
        return [
            self._convert(start, users | settings.users_of(start.name), "--dense"),
            *search,
            best,
            self._evaluate("full"),
        ]

    def _lora(self, name: str, rank: int | None = None) -> list[Task]:
        """LoRA at the best rate; `rank`: None is the largest that makes sense."""

        def train(model: str, rate: float | None = None) -> Task:
            steps, hf = self._steps(settings.SEARCH_SHARE if rate else 1), self.run / f"{model}-hf"
            words: Words = ["-m", "examples.real_model.lora", "--base", self.base, "--run", self.run / model]
            words += ["--data-path", self.data / "expanded_text_document", "--save", hf, "--train-iters", str(steps)]
            words += ["--seed", str(SEEDS[0]), *(["--rank", str(rank)] if rank else [])]
            task = Task(
                name=model,
                command=lambda: [*words, "--lr", f"{rate or self._best_rate(name):g}"],
                made_from=("base", "preprocess-expanded"),
                decided_by=() if rate else self._searches(name),
                is_complete=(hf / "config.json").is_file,
                continues=self.run / model,
            )
            return _tagged({name}, task, minutes=1 + _minutes("lora", steps), memory_gib=8, disk_gib=1.5)

        return [*self._search(name, {name}, train), train(name), self._evaluate(name)]

    def _search(self, setting: str, tags: Tags, train: Callable[..., Task]) -> list[Task]:
        """A short run per learning rate; `train` makes it from its name and `rate`."""
        found = []
        for rate in () if self.is_short else settings.RATES[setting]:
            model = rates.search_name(setting, rate)
            found += [train(model, rate=rate), self._evaluate(model, tags, is_validation=True)]
        return found

    def _searches(self, setting: str) -> tuple[str, ...]:
        return () if self.is_short else rates.searches(setting)

    def _best_rate(self, setting: str) -> float:
        return settings.FOUND_RATES[setting] if self.is_short else rates.best_rate(self.run, setting)

    def _continuations(self) -> list[Task]:
        """Exports, and what up to four models write after the same words."""
        exports = {"copies": "copies-seed-1", "full": "full"}
        found = [
            _tagged({x} | _calibrated_of(model), tasks.export(self.run / model), disk_gib=2)
            for x, model in exports.items()
        ]
        names = [f"{language}.{number}" for language in LANGUAGES for number in range(1, PROMPTS + 1)]
        prompts = {name: self.text / f"prompt.{name}.jsonl" for name in names}
        output = self.run / "continuations"
        options = ("--continuations", "40", "--prompts", "1", "--language-id", "none", "--dtype", "bfloat16")
        task = Task(
            name="continuations",
            command=lambda: tasks.evaluation_words("text", self._exports(), prompts, output, *options),
            made_from=("split", *self._continued.values()),
            is_complete=(output / "results.json").is_file,
        )
        return [*found, _tagged(("copies", "full", "lora"), task, minutes=5)]

    def _wrong_language(self) -> Task:
        """How often some models go on in another language; in a short queue, also the unseen languages."""
        output = self.run / "wrong-language"
        if self.is_short:
            text = {x: self.run / unseen.FOLDER / f"{x}.interface.jsonl" for x in (*LANGUAGES, *unseen.LANGUAGES)}
        else:
            text = {x: self.corpus / f"held-out.interface.{x}.jsonl" for x in LANGUAGES}
        options = "--continuations 32 --prompts 16 --max-documents 16 --language-id py3langid --dtype bfloat16".split()
        task = Task(
            name="wrong-language",
            command=lambda: tasks.evaluation_words("text", self._exports(), text, output, *options),
            made_from=("unseen" if self.is_short else "text", *self._continued.values()),
            is_complete=(output / "results.json").is_file,
        )
        return _tagged((model.removesuffix("-seed-1") for model in self._continued if model != BASE), task, minutes=8)

    @property
    def _continued(self) -> dict[str, str]:
        return SHORT_CONTINUED if self.is_short else CONTINUED

    def _exports(self) -> dict[str, Path]:
        """The models that write continuations, if they have been made."""
        done = Workflow(self.run, ()).wall_times_s()
        made = [model for model, task in self._continued.items() if task in done]
        return {BASE: self.base} | {model: self.run / f"{model}-hf" for model in made if model != BASE}

    def _convert(self, save: Path, tags: Tags, *options: str, made_from: tuple[str, ...] = ("base",)) -> Task:
        task = tasks.convert(save, self.base, *options, "--seed", str(SEEDS[0]), made_from=made_from)
        return _tagged(tags, task, minutes=0.5, disk_gib=1.4)

    def _evaluate(self, model: str, tags: Tags | None = None, *, is_validation: bool = False) -> Task:
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
        return _tagged(tags or users, task, minutes=0.5 + tokens / SPEED["evaluate"] / 60)

    def _evaluate_unseen(self, model: str) -> Task:
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
            made_from=("unseen", *unseen.WRITTEN, *dict.fromkeys(["base", model])),
            is_complete=lambda: rates.bits_per_byte(output, model).keys() >= unseen.files(self.run).keys(),
        )
        minutes = 0.5 + UNSEEN_TOKENS / SPEED["evaluate"] / 60
        return _tagged(ALL if model == BASE else settings.users_of_model(model), task, minutes=minutes)

    def _steps(self, share: float) -> int:
        return steps_of(share * self.tokens)

    def _train(
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
        data = self._blended(blend, corpora)

        def steps() -> int:
            return self._steps(share * (self._tokens_left() if is_shorter else 1))

        def command() -> Words:
            given = self._best_rate(searched) if searched else rate or highest
            schedule = settings.schedule(steps(), given or settings.STAGE_RATES[stage])
            return tasks.training_words(stage, start, data, save, *schedule, *fixed, *options)

        try:
            expected = steps()
        except UserError:
            expected = self._steps(share)
        task = Task(
            name=model,
            command=command,
            made_from=(start.name, *(f"preprocess-{corpora}{group}" for group in blend)),
            decided_by=self._searches(searched) if searched else ("preprocess-expanded",) if is_shorter else (),
            environment={"NPROC_PER_NODE": str(ranks)},
            # The last step is there, with the steps whose frozen tensors it needs.
            is_complete=lambda: tasks.is_finished(save) and bool(checkpoint_chain(save)),
            continues=save,
        )
        minutes, disk = 1.5 + _minutes(kind, expected), 0.3 if rate else DISK_GIB[kind]
        return _tagged(tags, task, minutes=minutes, memory_gib=MEMORY_GIB[kind], disk_gib=disk)


def fixed_options(ranks: int) -> list[str]:
    """The flags that all runs of the trainer have; no saved step but the last is kept."""
    micro_batch = settings.MICRO_BATCH // ranks
    return (
        f"--bf16 --seq-length {settings.SEQUENCE_LENGTH} --global-batch-size {settings.BATCH} --micro-batch-size "
        f"{micro_batch} --weight-decay 0 --adam-beta2 {settings.BETA2} --log-interval 10 --save-interval "
        f"{SAVE_INTERVAL} --save-retain-interval {SAVE_INTERVAL * 1000}"
    ).split()


def moe_options(name: str) -> list[str]:
    copies = TOPK if name == "copies" else 1
    options = f"--num-new-experts {settings.NUM_NEW_EXPERTS} --topk {TOPK} --original-copies {copies}".split()
    return options + (["--new-experts", "random"] if name == "random" else [])


def _tagged(tags: Tags, task: Task, **fields: Any) -> Task:
    return replace(task, tags=frozenset(tags), **fields)


def _calibrated_of(run: str) -> set[str]:
    """The settings whose models are a run's export with calibrated routers."""
    return {setting for setting, source in settings.CALIBRATED.items() if source == run}


def _minutes(kind: str, steps: int) -> float:
    return steps * settings.STEP_TOKENS / SPEED[kind] / 60


def _ranks_of_plain_moe() -> int:
    """Two, unless the machine has a single GPU."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2
