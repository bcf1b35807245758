"""The tasks of the queue in their order: a believable page early, further seeds last."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from examples.real_model.downloads import SOURCES
from examples.real_model.settings import (
    ALL,
    BASE,
    EXPANDED,
    GROUPS,
    LANGUAGES,
    LORA_16,
    MORE_TEXT,
    NUM_NEW_EXPERTS,
    NUM_NEW_TOKENS,
    ORIGINAL,
    RATES,
    REPLAY,
    REPLAY_BLEND,
    REVIEW_BLEND,
    REVIEW_SHARE,
    SAME_BYTES,
    SAME_TOKENS,
    SEARCH_SHARE,
    SEEDS,
    SEQUENCE_LENGTH,
    SETTINGS,
    STAGE0_BLEND,
    STAGE0_RATE,
    STAGE0_SHARE,
    STAGE1_OF,
    STAGE1_RATE,
    STAGE2_RATE,
    STEP_TOKENS,
    TOKENS,
    TOPK,
    VOCABULARY,
    VOCABULARY_START,
    model_folder,
    steps_of,
)
from examples.real_model.task import Command, Task
from examples.real_model.training import Training
from examples.steps import Steps
from moelpr.data.manifest import Manifest
from moelpr.evaluate.result_cache import cached_results
from moelpr.process.errors import UserError

EXPANDED_ONLY = {"expanded": 1.0}  # blend
EXTENDED = "extended-"  # how the names of corpora of the extended tokenizer start
PROMPTS = 3  # per language
CONTINUED = (BASE, "copies-seed-1", "full", "lora")  # models whose continuations and cloze scores are shown
EXPORTS = ("base", "export-copies-seed-1", "export-full", "lora")  # the tasks that write them for transformers
# Tokens per second on two cores of a Xeon with AVX-512 and bf16 matrix products.
RATE_OF = {"lora": 218, "evaluate": 400, "cloze": 500}
EVALUATION_TOKENS, CLOZE_TOKENS = 125_000, 500 * 6 * 4 * 50  # of a model


class Tasks:
    """All tasks of a run folder."""

    def __init__(self, run: Path, base: Path | None = None, tokens: int = TOKENS) -> None:
        """`base`: Hugging Face directory; by default SmolLM2-135M-Instruct, which is downloaded."""
        self.run, self.base, self.tokens = run, base or run / "base-hf", tokens
        self.corpus, self.text, self.data = run / "corpus", run / "text", run / "data"

    def all(self) -> list[Task]:
        """In the order in which they run."""
        first, rest = SEEDS[0], SEEDS[1:]
        tasks = [
            *self._text(),
            self._evaluate(BASE),
            *self._stage1("copies"),
            *self._stage2("copies", first),
            *self._full(),
            *self._lora("lora"),
            *self._continuations(),
            *self._stage1("one-copy"),
            *self._stage2("one-copy", first),
            *self._stage2("no-lpr", first),
            *self._stage1("random"),
            *self._stage2("random", first),
            *self._stage2("reference", first),
            *self._plain(),
            *self._vocabulary(),
            *self._cloze(),
            *(task for seed in rest for name in ("copies", "one-copy", "no-lpr") for task in self._stage2(name, seed)),
            *(task for seed in rest for task in self._stage2("reference", seed)),
            *self._rates_of_copies(),
            *(task for name, times in MORE_TEXT.items() for task in self._more_text(name, times)),
            *self._replay(),
            *self._lora(LORA_16, rank=16),
        ]
        if self._downloads_base:
            return tasks
        return [replace(task, files=(*task.files, self.base)) if "base" in task.made_from else task for task in tasks]

    @property
    def _downloads_base(self) -> bool:
        return self.base == self.run / "base-hf"

    def _text(self) -> list[Task]:
        """Base and text, the validation part and prompts, and one corpus per language group."""
        everyone = frozenset(ALL)
        tasks = [
            Task(
                "text",
                everyone,
                lambda: ["-m", "examples.real_model.text", "--run", self.run, "--overwrite"],
                3,
                2,
                0.3,
                files=(SOURCES,),
                is_complete=(self.corpus / "facts.json").is_file,
            ),
            Task(
                "split",
                everyone,
                lambda: ["-m", "examples.real_model.split", "--run", self.run, "--overwrite"],
                0.2,
                made_from=("text",),
                is_complete=self.text.is_dir,
            ),
        ]
        if self._downloads_base:
            download: Command = ["-m", "examples.real_model.base", "--run", self.run, "--overwrite"]
            is_complete = (self.base / "config.json").is_file
            tasks.insert(
                0, Task("base", everyone, lambda: download, 1, 2, 1, files=(SOURCES,), is_complete=is_complete)
            )
        return [*tasks, *self._preprocess(everyone, self.base)]

    def _preprocess(self, settings: frozenset[str], tokenizer: Path, prefix: str = "") -> list[Task]:
        """A corpus per language group."""
        tasks = []
        for group, languages in GROUPS.items():
            command: Command = [
                *("data_tools/preprocess_data.py", "--input", *(self.text / f"train.{x}.jsonl" for x in languages)),
                *("--output-prefix", self.data / f"{prefix}{group}", "--tokenizer-type", "HuggingFaceTokenizer"),
                *("--tokenizer-model", tokenizer, "--append-eod", "--language", group, "--overwrite"),
            ]
            tasks.append(
                Task(
                    f"preprocess-{prefix}{group}",
                    settings,
                    lambda command=command: command,
                    0.2,
                    made_from=("split", "tokenizer" if prefix else "base"),
                    is_complete=(self.data / f"{prefix}{group}_text_document.manifest.json").is_file,
                )
            )
        return tasks

    def _stage1(self, name: str) -> list[Task]:
        """Upcycling and stage 1, for all settings that start from it."""
        run = STAGE1_OF[name]
        start = self.run / f"upcycled-{name}"
        users = frozenset({s.name for s in SETTINGS.values() if run in (s.name, *s.before)})
        upcycled_for = users | {"one-copy": {"plain"}, "copies": {*MORE_TEXT}}.get(name, set())
        train = Training(
            model=run,
            stage="stage1",
            start=start,
            blend=EXPANDED_ONLY,
            steps=steps_of(self.tokens),
            rate=STAGE1_RATE,
            settings=users,
        )
        tasks = [self._convert(start, upcycled_for, *moe_options(name)), train.task(self.run)]
        if run in SETTINGS:
            tasks.append(self._evaluate(run))
        return tasks

    def _stage2(self, name: str, seed: int, times: int = 1) -> list[Task]:
        """`times`: the tokens of the other settings."""
        setting = SETTINGS[name]
        options = {"no-lpr": ("--lpr-loss-coeff", "0"), "reference": ("--lpr-loss", "reference")}
        model = setting.models[SEEDS.index(seed)]
        train = Training(
            model=model,
            stage="stage2",
            start=self.run / setting.before[-1],
            blend=REVIEW_BLEND,
            steps=steps_of(times * self.tokens * REVIEW_SHARE),
            rate=STAGE2_RATE,
            settings=frozenset({name}),
            options=options.get(name, ()),
            seed=seed,
        )
        return [train.task(self.run), self._evaluate(model)]

    def _plain(self) -> list[Task]:
        """Stage 1 with everything trained."""
        train = Training(
            model="plain",
            stage="stage1",
            start=self.run / "upcycled-one-copy",
            blend=EXPANDED_ONLY,
            steps=steps_of(self.tokens),
            rate=STAGE1_RATE,
            settings=frozenset({"plain"}),
            trains_everything=True,
        )
        return [train.task(self.run), self._evaluate("plain")]

    def _more_text(self, name: str, times: int) -> list[Task]:
        """Both stages of MoE-LPR with K copies and more tokens."""
        (stage1,) = SETTINGS[name].before
        train = Training(
            model=stage1,
            stage="stage1",
            start=self.run / "upcycled-copies",
            blend=EXPANDED_ONLY,
            steps=steps_of(times * self.tokens),
            rate=STAGE1_RATE,
            settings=frozenset({name}),
        )
        return [train.task(self.run), *self._stage2(name, SEEDS[0], times)]

    def _replay(self) -> list[Task]:
        """Full fine-tuning at the rate that its search found, with the text of both stages of MoE-LPR."""
        train = Training(
            model=REPLAY,
            stage="dense",
            start=self.run / "dense",
            blend=REPLAY_BLEND,
            steps=steps_of(self.tokens * (1 + REVIEW_SHARE)),
            rate=lambda: best_rate(self.run, "full"),
            settings=frozenset({REPLAY}),
            after=searches("full"),
        )
        return [train.task(self.run), self._evaluate(REPLAY)]

    def _vocabulary(self) -> list[Task]:
        """New tokens: tokenizer, corpora and model; then three stages for as much text, and for as many tokens."""
        users, tokenizer, start = frozenset(VOCABULARY), self.run / "tokenizer", self.run / VOCABULARY_START
        extend: Command = [
            *("data_tools/extend_tokenizer.py", "--tokenizer", self.base, "--num-new-tokens", str(NUM_NEW_TOKENS)),
            *("--input", *(f"{x}={self.text / f'train.{x}.jsonl'}" for x in EXPANDED)),
            *("--original", *(f"{x}={self.text / f'train.{x}.jsonl'}" for x in ORIGINAL)),
            *("--save", tokenizer, "--overwrite"),
        ]
        options = (*moe_options("copies"), "--extended-tokenizer", str(tokenizer))
        tasks = [
            Task("tokenizer", users, lambda: extend, 1, made_from=("base", "split"), is_complete=tokenizer.is_dir),
            *self._preprocess(users, tokenizer, EXTENDED),
            self._convert(start, users, *options, made_from=("base", "tokenizer")),
            self._evaluate(VOCABULARY_START),
        ]
        for name in (SAME_BYTES, SAME_TOKENS):
            owners, (stage0, stage1) = frozenset({name}), VOCABULARY[name].before

            def steps(share: float, name: str = name) -> int:
                return steps_of(share * self.tokens * (self._tokens_left() if name == SAME_BYTES else 1))

            sizes = ("preprocess-expanded",) if name == SAME_BYTES else ()

            stages = (
                Training(
                    model=stage0,
                    stage="stage0",
                    start=start,
                    blend=STAGE0_BLEND,
                    steps=partial(steps, STAGE0_SHARE),
                    most_steps=steps_of(STAGE0_SHARE * self.tokens),
                    after=sizes,
                    rate=STAGE0_RATE,
                    settings=owners,
                    corpora=EXTENDED,
                ),
                Training(
                    model=stage1,
                    stage="stage1",
                    start=self.run / stage0,
                    blend=EXPANDED_ONLY,
                    steps=partial(steps, 1 - STAGE0_SHARE),
                    most_steps=steps_of((1 - STAGE0_SHARE) * self.tokens),
                    after=sizes,
                    rate=STAGE1_RATE,
                    settings=owners,
                    options=("--train-new-embeddings",),
                    corpora=EXTENDED,
                ),
                Training(
                    model=name,
                    stage="stage2",
                    start=self.run / stage1,
                    blend=REVIEW_BLEND,
                    steps=steps_of(self.tokens * REVIEW_SHARE),
                    rate=STAGE2_RATE,
                    settings=owners,
                    corpora=EXTENDED,
                ),
            )
            tasks += [*(stage.task(self.run) for stage in stages), self._evaluate(name)]
        return tasks

    def _tokens_left(self) -> float:
        """Tokens of the expanded languages' text after the extension, as a fraction of those before.

        Raises:
            UserError: one of both corpora is missing or damaged.
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
        users = frozenset({"full", REPLAY})

        def train(model: str, steps: int, rate: float | Callable[[], float]) -> Task:
            return Training(
                model=model,
                stage="dense",
                start=self.run / "dense",
                blend=EXPANDED_ONLY,
                steps=steps,
                rate=rate,
                settings=frozenset({"full"}) if model == "full" else users,
                is_search=model != "full",
                after=searches("full") if model == "full" else (),
            ).task(self.run)

        convert = self._convert(self.run / "dense", users, "--dense")
        best = train("full", steps_of(self.tokens), lambda: best_rate(self.run, "full"))
        return [convert, *self._search("full", train, users), best, self._evaluate("full")]

    def _lora(self, name: str, rank: int | None = None) -> list[Task]:
        """LoRA at the best rate; `rank`: None is the largest that makes sense."""
        users = frozenset({name})

        def train(model: str, steps: int, rate: float | Callable[[], float]) -> Task:
            def command() -> Command:
                found = rate() if callable(rate) else rate
                return [
                    *("-m", "examples.real_model.lora", "--base", self.base, "--run", self.run / model),
                    *("--data-path", self.data / "expanded_text_document", "--save", self.run / f"{model}-hf"),
                    *("--train-iters", str(steps), "--lr", f"{found:g}", "--seed", str(SEEDS[0])),
                    *(["--rank", str(rank)] if rank else []),
                ]

            return Task(
                model,
                users,
                command,
                minutes=1 + steps * STEP_TOKENS / RATE_OF["lora"] / 60,
                memory_gib=8,
                disk_gib=1.5,
                blocks=model == name,
                made_from=("base", "preprocess-expanded"),
                after=searches(name) if model == name else (),
                is_complete=(self.run / f"{model}-hf" / "config.json").is_file,
                continues=self.run / model,
            )

        best = train(name, steps_of(self.tokens), lambda: best_rate(self.run, name))
        return [*self._search(name, train, users), best, self._evaluate(name)]

    def _rates_of_copies(self) -> list[Task]:
        """Short runs of stage 1."""

        def train(model: str, steps: int, rate: float) -> Task:
            return Training(
                model=model,
                stage="stage1",
                start=self.run / "upcycled-copies",
                blend=EXPANDED_ONLY,
                steps=steps,
                rate=rate,
                settings=frozenset({"copies"}),
                is_search=True,
            ).task(self.run)

        return self._search("copies", train, frozenset({"copies"}))

    def _search(self, setting: str, train: Callable[[str, int, float], Task], users: frozenset[str]) -> list[Task]:
        """A short run per learning rate; `train` makes it from its name, its number of steps and its rate."""
        tasks = []
        for rate in RATES[setting]:
            model = search_name(setting, rate)
            tasks.append(train(model, steps_of(self.tokens * SEARCH_SHARE), rate))
            tasks.append(self._evaluate(model, users, validation=True))
        return tasks

    def _continuations(self) -> list[Task]:
        """Exports, and what up to four models write after the same words."""
        tasks = []
        for model, setting in (("copies-seed-1", "copies"), ("full", "full")):
            words: Command = [
                *("checkpoint_convert/mcore_to_hf.py", "--load", self.run / model),
                *("--save", self.run / f"{model}-hf", "--overwrite"),
            ]
            tasks.append(
                Task(
                    f"export-{model}",
                    frozenset({setting}),
                    lambda words=words: words,
                    1,
                    4,
                    2,
                    made_from=(model,),
                    is_complete=(self.run / f"{model}-hf" / "config.json").is_file,
                )
            )
        names = [f"{language}.{number}" for language in LANGUAGES for number in range(1, PROMPTS + 1)]
        data: Command = [word for x in names for word in ("--data", f"{x}={self.text / f'prompt.{x}.jsonl'}")]

        def command() -> Command:
            options = ("--continuations", "40", "--dtype", "bfloat16", "--output", self.run / "continuations")
            return ["-m", "moelpr.evaluate", *self._exports(), *data, *options]

        return [
            *tasks,
            Task(
                "continuations",
                frozenset({"copies", "full", "lora"}),
                command,
                5,
                blocks=False,
                made_from=("split", *EXPORTS),
                is_complete=(self.run / "continuations" / "results.json").is_file,
            ),
        ]

    def _cloze(self) -> list[Task]:
        """The multiple-choice task, and up to four models' scores on it."""
        users = frozenset({"copies", "full", "lora"})
        write: Command = ["-m", "examples.real_model.cloze", "--run", self.run, "--overwrite"]
        folder = self.run / "cloze"

        def command() -> Command:
            return [
                *("-m", "moelpr.evaluate", "harness", *self._exports(), "--tasks", folder / "tasks.yaml"),
                *("--include-path", folder / "tasks", "--languages", ",".join(LANGUAGES)),
                *("--original-languages", ",".join(ORIGINAL), "--dtype", "bfloat16", "--batch-size", "16"),
                *("--output", self.run / "scores"),
            ]

        minutes = len(CONTINUED) * CLOZE_TOKENS / RATE_OF["cloze"] / 60
        return [
            Task("cloze", users, lambda: write, 0.2, blocks=False, made_from=("text",), is_complete=folder.is_dir),
            Task(
                "evaluate-cloze",
                users,
                command,
                minutes,
                blocks=False,
                variables={"HF_HUB_OFFLINE": "1"},
                made_from=("cloze", *EXPORTS),
                is_complete=(self.run / "scores" / "harness.json").is_file,
            ),
        ]

    def _exports(self) -> Command:
        """The models of CONTINUED that have been made."""
        found = {BASE: self.base}
        for model, task in zip(CONTINUED[1:], EXPORTS[1:], strict=True):
            if Steps(self.run).is_done(task):
                found[model] = self.run / f"{model}-hf"
        return [word for name, folder in found.items() for word in ("--model", f"{name}={folder}")]

    def _convert(
        self, save: Path, settings: frozenset[str], *options: str, made_from: tuple[str, ...] = ("base",)
    ) -> Task:
        command: Command = ["checkpoint_convert/hf_to_mcore.py", "--hf-path", self.base, "--save", save]
        command += [*options, "--seed", str(SEEDS[0]), "--overwrite"]
        is_complete = (save / "model_spec.json").is_file
        return Task(save.name, settings, lambda: command, 0.5, 4, 1.4, made_from=made_from, is_complete=is_complete)

    def _evaluate(self, model: str, settings: frozenset[str] | None = None, *, validation: bool = False) -> Task:
        """Bits per byte and routing of a model on all held-out text, or on the validation part."""
        folder = self.run / ("validation" if validation else "evaluation")

        def command() -> Command:
            files = self._validation_files() if validation else held_out_files(self.corpus)
            models = dict.fromkeys([BASE, model])
            original = [name for name in files if name.split(".")[0] in ORIGINAL]
            return [
                *("-m", "moelpr.evaluate"),
                *(w for x in models for w in ("--model", f"{x}={model_folder(self.run, self.base, x)}")),
                *(w for name, path in files.items() for w in ("--data", f"{name}={path}")),
                *(["--original-languages", ",".join(original)] if original else []),
                *("--dtype", "bfloat16", "--sequence-length", str(SEQUENCE_LENGTH), "--output", folder),
            ]

        tokens = EVALUATION_TOKENS / (6 if validation else 1)
        owners = next((frozenset({s.name}) for s in ALL.values() if model in s.models), frozenset[str]())
        if model == BASE:
            owners = frozenset(ALL)
        minutes = 0.5 + tokens / RATE_OF["evaluate"] / 60
        return Task(
            f"evaluate-{model}",
            settings or owners,
            command,
            minutes,
            blocks=model == BASE,
            made_from=("split" if validation else "text", *dict.fromkeys(["base", model])),
            is_complete=lambda: bits_per_byte(folder, model).keys() >= self._evaluated(validation),
        )

    def _evaluated(self, validation: bool) -> set[str]:
        """Names of the texts of an evaluation."""
        return {*EXPANDED} if validation else {*held_out_files(self.corpus)}

    def _validation_files(self) -> dict[str, Path]:
        return {language: self.text / f"validation.{language}.jsonl" for language in EXPANDED}


def moe_options(name: str) -> list[str]:
    copies = TOPK if name == "copies" else 1
    options = ["--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK), "--original-copies", str(copies)]
    return options + (["--new-experts", "random"] if name == "random" else [])


def held_out_files(corpus: Path) -> dict[str, Path]:
    """ "el.manuals" -> held-out text of that language and kind, languages in our order."""
    names = [path.name.split(".")[1:3] for path in sorted(corpus.glob("held-out.*.*.jsonl"))]
    kinds = list(dict.fromkeys(kind for kind, _ in names))
    if not kinds or sorted(names) != sorted([kind, language] for kind in kinds for language in LANGUAGES):
        raise UserError(
            f"{corpus} must contain held-out.KIND.LANG.jsonl for each kind and language ({', '.join(LANGUAGES)})"
        )
    return {f"{x}.{kind}": corpus / f"held-out.{kind}.{x}.jsonl" for kind in kinds for x in LANGUAGES}


def search_name(setting: str, rate: float) -> str:
    return f"search-{setting}-{rate:g}"


def searches(setting: str) -> tuple[str, ...]:
    """The tasks that find a setting's rate."""
    return tuple(f"evaluate-{search_name(setting, rate)}" for rate in RATES[setting])


def searched_changes(run: Path, setting: str) -> dict[float, float]:
    """Learning rate -> mean change of the expanded languages against base on the validation part, of those measured."""
    changes = {}
    for rate in RATES.get(setting, ()):
        bits = [bits_per_byte(run / "validation", model) for model in (BASE, search_name(setting, rate))]
        if all(found.keys() >= {*EXPANDED} for found in bits):  # an evaluation may be in progress
            changes[rate] = fmean(bits[1][language] / bits[0][language] - 1 for language in EXPANDED)
    return changes


def bits_per_byte(folder: Path, model: str) -> dict[str, float]:
    """Of each text that a model was evaluated on; {} if it was not."""
    scores = {text: score for text, score in cached_results(folder, model).items() if "document_bits" in score}
    return {text: sum(score["document_bits"]) / sum(score["document_bytes"]) for text, score in scores.items()}


def best_rate(run: Path, setting: str) -> float:
    """The rate with the lowest bits per byte; one that diverged is never the best."""
    changes = searched_changes(run, setting)
    if not changes:
        marks = run / "logs" / f"evaluate-search-{setting}-*.json"
        raise UserError(
            f"{run}/validation has no results of the search of {setting}; remove {marks} and rerun make results"
        )
    return min(changes, key=lambda rate: changes[rate] if changes[rate] == changes[rate] else float("inf"))
