"""The tasks of the queue in their order: a believable page early, further seeds last."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from examples import tasks
from examples.languages import EXPANDED, LANGUAGES, ORIGINAL
from examples.real_model import settings, unseen
from examples.real_model.rivals import rivals
from examples.real_model.settings import ALL, BASE, SEEDS, SETTINGS, VOCABULARY_START
from examples.real_model.task_maker import EXTENDED, TaskMaker, minutes_of, moe_options, tagged
from examples.real_model.text import Facts
from examples.tasks import Words
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow

PROMPTS = 3  # per language


class Queue(TaskMaker):
    """All tasks of a run folder."""

    def tasks(self) -> list[Task]:
        """All tasks, in the order in which they run."""
        first, rest = SEEDS[0], () if self.is_short else SEEDS[1:]
        search_stage1 = partial(self.train, stage="stage1", start=self.run / "upcycled-copies", tags={"copies"})
        found = [
            *self._text(),
            self.evaluate(BASE),
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
            *self.search("copies", {"copies"}, search_stage1),
            *(task for name, times in settings.MORE_TEXT.items() for task in self._more_text(name, times)),
            *self._replay(),
            *self._lora(settings.LORA_16, rank=16),
            *rivals(self),
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
        return [*([] if self.is_short else [task]), self.evaluate_unseen(model)]

    def _text(self) -> list[Task]:
        """Base and text, the validation part and prompts, and one corpus per language group."""
        base = self.download("base", self.given / "config.json", 1, disk_gib=1)
        return [
            *([replace(base, name="tuned" if self.is_plain else "base")] if self._is_base_downloaded else []),
            self.download("text", self.corpus / Facts.FILE_NAME, 3, disk_gib=0.3),
            *(self._plain_base() if self.is_plain else []),
            self.script("split", ALL, self.text, 0.2, made_from=("text",)),
            *self.preprocess(ALL, self.base),
            self.script("unseen", ALL, self.run / unseen.FOLDER, 0.3, made_from=("text",)),
        ]

    def _plain_base(self) -> list[Task]:
        """Train the base that is given on plain text; the result is the base of all settings."""
        text, start, trained = self.run / "plain-text", self.run / "tuned-dense", self.run / "plain-base"
        made_from, files = (("tuned",), ()) if self._is_base_downloaded else ((), (self.given,))
        from_text = ("plain_text", *made_from)
        corpus = tasks.preprocess(self.data / "plain", [text / "*.jsonl"], self.given, "original", made_from=from_text)
        convert = tasks.convert(start, self.given, "--dense", made_from=made_from)
        size: dict[str, Any] = {"share": settings.PLAIN_SHARE, "highest": settings.FOUND_RATES["full"]}
        return [
            self.script("plain_text", ALL, text, 0.2, made_from=("text",)),
            tagged(ALL, corpus, files=files, minutes=0.2),
            tagged(ALL, convert, files=files, disk_gib=1.4),
            self.train(trained.name, "dense", start, ALL, blend={"plain": 1}, **size),
            tagged(ALL, tasks.export(trained, "base"), disk_gib=1),
        ]

    def _stage1(self, name: str) -> list[Task]:
        """Upcycling and stage 1, for all settings that start from it."""
        run = settings.STAGE1_OF[name]
        start = self.run / f"upcycled-{name}"
        users = {setting.name for setting in SETTINGS.values() if run in (setting.name, *setting.before)}
        upcycled_for = users | {"one-copy": {"plain"}, "copies": {*settings.MORE_TEXT}}.get(name, set())
        upcycled_for |= settings.users_of(start.name)
        found = [self.convert(start, upcycled_for, *moe_options(name)), self.train(run, "stage1", start, users)]
        return [*found, *([self.evaluate(run)] if run in SETTINGS else [])]

    def _stage2(self, name: str, seed: int, times: int = 1) -> list[Task]:
        """Review; `times` as many tokens as in the other settings."""
        setting, share = SETTINGS[name], times * settings.REVIEW_SHARE
        options = {"no-lpr": ("--lpr-loss-coeff", "0"), "reference": ("--lpr-loss", "reference")}.get(name, ())
        model, start = setting.models[SEEDS.index(seed)], self.run / setting.before[-1]
        train = self.train(model, "stage2", start, {name}, options=options, share=share, seed=seed)
        return [train, self.evaluate(model)]

    def _plain(self) -> list[Task]:
        """Stage 1 with everything trained."""
        start = self.run / "upcycled-one-copy"
        train = self.train("plain", "stage1", start, {"plain"}, trains_everything=True)
        return [train, self.evaluate("plain")]

    def _more_text(self, name: str, times: int) -> list[Task]:
        """Both stages of MoE-LPR with K copies and more tokens."""
        (stage1,) = SETTINGS[name].before
        train = self.train(stage1, "stage1", self.run / "upcycled-copies", {name}, share=times)
        return [train, *self._stage2(name, SEEDS[0], times)]

    def _replay(self) -> list[Task]:
        """Full fine-tuning at the rate that its search found, with the text of both stages of MoE-LPR."""
        name, share = settings.REPLAY, 1 + settings.REVIEW_SHARE
        text: dict[str, Any] = {"share": share, "blend": settings.REPLAY_BLEND}
        train = self.train(name, "dense", self.run / "dense", {name}, searched="full", **text)
        return [train, self.evaluate(name)]

    def _vocabulary(self) -> list[Task]:
        """New tokens: tokenizer, corpora and model; then three stages for as much text, and for as many tokens."""
        users, tokenizer, start = settings.VOCABULARY, self.run / "tokenizer", self.run / VOCABULARY_START
        new_tokens = ["--num-new-tokens", str(settings.NUM_NEW_TOKENS)]
        extend: Words = ["data_tools/extend_tokenizer.py", "--tokenizer", self.base, *new_tokens]
        for flag, languages in (("--input", EXPANDED), ("--original", ORIGINAL)):
            extend += [flag, *(f"{x}={path}" for x, path in self.train_files(languages).items())]
        extend += ["--save", tokenizer, "--overwrite"]
        made_from = ("base", "split")
        options = (*moe_options("copies"), "--extended-tokenizer", str(tokenizer))
        found = [
            tagged(users, Task(name="tokenizer", command=extend, made_from=made_from, is_complete=tokenizer.is_dir)),
            *self.preprocess(users, tokenizer, EXTENDED),
            self.convert(start, users, *options, made_from=("base", "tokenizer")),
            self.evaluate(VOCABULARY_START),
        ]
        for name in (settings.SAME_BYTES, settings.SAME_TOKENS):
            found += self._stages_of_vocabulary(name, start)
        return found

    def _stages_of_vocabulary(self, name: str, start: Path) -> list[Task]:
        """Three stages with new tokens; SAME_BYTES takes as many steps as its tokens need."""
        stage0, stage1 = settings.VOCABULARY[name].before
        share0, is_shorter = settings.STAGE0_SHARE, name == settings.SAME_BYTES
        train = partial(self.train, tags={name}, corpora=EXTENDED)
        trained = ("--train-new-embeddings",)
        return [
            train(stage0, "stage0", start, share=share0, is_shorter=is_shorter),
            train(stage1, "stage1", self.run / stage0, share=1 - share0, is_shorter=is_shorter, options=trained),
            train(name, "stage2", self.run / stage1, share=settings.REVIEW_SHARE),
            self.evaluate(name),
        ]

    def _full(self) -> list[Task]:
        """Full fine-tuning at the best rate."""
        users, start = {"full", settings.REPLAY}, self.run / "dense"
        best = self.train("full", "dense", start, {"full"}, searched="full")
        search = self.search("full", users, partial(self.train, stage="dense", start=start, tags=users))
        return [
            self.convert(start, users | settings.users_of(start.name), "--dense"),
            *search,
            best,
            self.evaluate("full"),
        ]

    def _lora(self, name: str, rank: int | None = None) -> list[Task]:
        """LoRA at the best rate; `rank`: None is the largest that makes sense."""

        def train(model: str, rate: float | None = None) -> Task:
            steps, hf = self.number_of_steps(settings.SEARCH_SHARE if rate else 1), self.run / f"{model}-hf"
            words: Words = ["-m", "examples.real_model.lora", "--base", self.base, "--run", self.run / model]
            words += ["--data-path", self.data / "expanded_text_document", "--save", hf, "--train-iters", str(steps)]
            words += ["--seed", str(SEEDS[0]), *(["--rank", str(rank)] if rank else [])]
            task = Task(
                name=model,
                command=lambda: [*words, "--lr", f"{rate or self.best_rate(name):g}"],
                made_from=("base", "preprocess-expanded"),
                decided_by=() if rate else self.searches(name),
                is_complete=(hf / "config.json").is_file,
                continues=self.run / model,
            )
            return tagged({name}, task, minutes=1 + minutes_of("lora", steps), memory_gib=8, disk_gib=1.5)

        return [*self.search(name, {name}, train), train(name), self.evaluate(name)]

    def _continuations(self) -> list[Task]:
        """Exports, and what up to four models write after the same words."""
        exports = {"copies": "copies-seed-1", "full": "full"}
        found = [
            tagged({x} | settings.calibrated_of(model), tasks.export(self.run / model), disk_gib=2)
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
        return [*found, tagged(("copies", "full", "lora"), task, minutes=5)]

    def _wrong_language(self) -> Task:
        """How often some models go on in another language; in a short queue, also the unseen languages."""
        output = self.run / "wrong-language"
        if self.is_short:
            number, languages = unseen.SENTENCES, (*LANGUAGES, *unseen.LANGUAGES)
            text = {x: self.run / unseen.FOLDER / f"prompts.{x}.jsonl" for x in languages}
        else:
            number, text = 16, {x: self.corpus / f"held-out.interface.{x}.jsonl" for x in LANGUAGES}
        options = f"--continuations 32 --prompts {number} --max-documents {number} --language-id py3langid".split()
        options += ["--dtype", "bfloat16"]
        task = Task(
            name="wrong-language",
            command=lambda: tasks.evaluation_words("text", self._exports(), text, output, *options),
            made_from=("unseen" if self.is_short else "text", *self._continued.values()),
            is_complete=(output / "results.json").is_file,
        )
        users = {user for model in self._continued if model != BASE for user in settings.users_of_model(model)}
        return tagged(users, task, minutes=8)

    @property
    def _continued(self) -> dict[str, str]:
        return settings.SHORT_CONTINUED if self.is_short else settings.CONTINUED

    def _exports(self) -> dict[str, Path]:
        """The models that write continuations, if they have been made."""
        done = Workflow(self.run, ()).wall_times_s()
        made = [model for model, task in self._continued.items() if task in done]
        return {BASE: self.base} | {model: self.run / f"{model}-hf" for model in made if model != BASE}
