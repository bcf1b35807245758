"""What is compared on the real model, and how each setting is trained.

A setting is one way to train, and has one model per seed. All read the same text in the same order, in steps of 1,024
tokens: TOKENS in stage 1, full fine-tuning and LoRA, REVIEW_SHARE of that in stage 2; but those of MORE_TEXT read more,
and REPLAY all at once. The settings of VOCABULARY have new tokens, and are compared with each other and with one of
SETTINGS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SEQUENCE_LENGTH = 512
BATCH, MICRO_BATCH = 2, 2  # sequences
STEP_TOKENS = BATCH * SEQUENCE_LENGTH
TOKENS = 163_840
REVIEW_SHARE, SEARCH_SHARE = 0.375, 0.25  # fractions of TOKENS for stage 2 and each run of a search
NUM_NEW_EXPERTS, TOPK = 3, 2
STAGE_RATES = {"stage0": 1e-3, "stage1": 3e-4, "stage2": 2e-3}
# Parts of the text of each language group; in stage 2 as in the paper.
BLENDS: dict[str, dict[str, float]] = {
    "stage0": {"expanded": 4, "original": 1},
    **dict.fromkeys(("stage1", "dense"), {"expanded": 1}),
    "stage2": {"original": 1, "expanded": 2},
}
LORA_16 = "lora-16"  # a rank that users of peft choose; the setting "lora" has the largest one that makes sense
LONG_CALIBRATED = "long-calibrated"  # stage 1 with new experts only and all tokens, then calibrated routers
# Rates of which the best for the expanded languages is searched, on a validation part of the text. Full fine-tuning and
# LoRA get it; for MoE-LPR, the search tells whether that of STAGE_RATES is as good.
RATES = {
    **dict.fromkeys(("full", "copies"), (1e-4, 3e-4, 1e-3)),
    **dict.fromkeys(("lora", LORA_16), (1e-4, 3e-4, 1e-3, 3e-3)),
}
BETA2 = 0.95
SEEDS = (1, 2, 3)
SEED_NAMES = ("", *(f"-seed-{seed}" for seed in SEEDS[1:]))  # ends of the names of settings with one seed each

# With new tokens: stage 0 gets a fraction of the tokens of stage 1, and stage 1 the others.
NUM_NEW_TOKENS, STAGE0_SHARE = 8000, 0.2

# MoE-LPR that reads more: is it the tokens that it lacks? Setting -> times the tokens of the others.
MORE_TEXT = {"copies-twice": 2, "copies-three-times": 3}
# Full fine-tuning on what MoE-LPR reads in both stages, at once: is it the replay text that it lacks?
REPLAY, REPLAY_BLEND = "full-replay", {"original": 1, "expanded": 10}
# `--short`: every setting on half the text, at the rates that the searches of the whole queue found.
SHORT_TOKENS, SHORT_DOCUMENTS = 81_920, 5
FOUND_RATES = {"full": 3e-4, "copies": 3e-4, "lora": 1e-3, LORA_16: 3e-3}
SHORT = (
    "copies",
    "new",
    LONG_CALIBRATED,
    "new-calibrated",
    "copies-calibrated",
    "full-10-0.0003",
    "ffn-10",
    "halfway",
    "near",
    "lora-16-10-0.003",
    "lora-switched",
)
# `--plain`: the base is trained on plain text first; with so many tokens, as a multiple of those of stage 1.
PLAIN_SHARE = 2.75
OTHER, OTHER_KNOWN = "other", "other-known"  # folders of text that replay lacks
BASE, STAGE1_OF = "base", {"copies": "copies-stage1", "one-copy": "one-copy-stage1", "random": "random-stage1"}


@dataclass(frozen=True)
class Training:
    """A training that a row of a table describes.

    Attributes:
        stage: A stage of the trainer; "lora" or "ffn": by examples.real_model.lora, adapters of rank 16 or all FFNs.
        start: The conversion or run that it starts from.
        blend: Text -> its parts.
        rate: Highest learning rate; None: that of the stage.
        share: Its tokens, as a multiple of those of stage 1.
        options: More flags of the trainer.
        seed: Of the order of its text, and of adapters.
    """

    stage: str
    start: str
    blend: Mapping[str, float]
    rate: float | None = None
    share: float = 1 + REVIEW_SHARE
    options: tuple[str, ...] = ()
    seed: int = 1


@dataclass(frozen=True)
class Calibrated:
    """A run's export whose routers are calibrated.

    Attributes:
        run: The run.
        options: More flags of moelpr model calibrate.
        pack: Folder of more text to keep than that of the training; "" if there is none.
    """

    run: str
    options: tuple[str, ...] = ()
    pack: str = OTHER


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: Name of the setting.
        label: Name on the page.
        before: The runs that its models continue, in order; () if they start from the base.
        seeds: Number of models, which differ in the order of the text.
        is_extra: Whether it is only trained if --only names it.
        training: How, if a row of a table says so.
        calibrated: Which export it is, if its routers are calibrated.
    """

    name: str
    label: str
    before: tuple[str, ...] = ()
    seeds: int = 1
    is_extra: bool = False
    training: Training | None = None
    calibrated: Calibrated | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of its models, of their run folders and of their results."""
        return tuple(f"{self.name}-seed-{seed}" for seed in SEEDS[: self.seeds]) if self.seeds > 1 else (self.name,)

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that its first model took; () if it is not trained."""
        is_trained = self.name not in (BASE, VOCABULARY_START, *MEANS, LORA_SWITCHED)
        is_trained &= self.calibrated is None
        return (*self.before, *self.models[:is_trained])


def _by_name(*settings: Setting) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


TIMES_LONGER = 1.9  # than full fine-tuning, about: a step of stage 1 on one core
NEW_STAGE1, LONG_STAGE1, HALFWAY, NEAR, HALFWAY_OF = "new-stage1", "long-stage1", "halfway", "near", "full-10-0.0003"
MEANS = {HALFWAY: 0.5, NEAR: 0.35}  # weight of the fine-tuned model
# Name, rate and seed of stage 1 with new experts only and the tokens of review, too.
LONG: tuple[tuple[str, float | None, int], ...] = (
    ("", None, 1),
    *((f"-seed-{seed}", None, seed) for seed in SEEDS[1:]),
    ("-0.0006", 6e-4, 1),
)
FAR, MAX_DISTANCE = "long-calibrated-far", 0.15  # calibrated for more learning: nats per token on text to keep
KNOWN = "long-calibrated-known"  # kept text is also in the languages that the others have never seen
AMOUNTS = (128, 512)  # tokens of each text that calibration reads; by default 2,048
TOP3_STAGE1 = "top-3-stage1"  # three choices per token
LORA_SWITCHED, SWITCHED = "lora-switched", f"{LORA_16}-0-0.003"
# Models that write continuations -> the task that writes each for transformers; in a short queue, others.
CONTINUED = {BASE: "base", "copies-seed-1": "export-copies-seed-1", "full": "export-full", "lora": "lora"}
SHORT_CONTINUED = {BASE: "base", LONG_CALIBRATED: LONG_CALIBRATED, HALFWAY_OF: f"export-{HALFWAY_OF}"}
NEW = "MoE-LPR, stage 1 with new experts only"


def _replay(percent: int) -> dict[str, float]:
    """Parts of the text with so much of it in the original languages."""
    return {"expanded": 100 - percent, "original": percent} if percent else {"expanded": 1}


def _variant(name: str) -> str:
    """What the end of a name says: "-seed-2" is ", seed 2"."""
    return f", {'' if 'seed' in name else 'rate '}{name[1:].replace('-', ' ')}" if name else ""


def _with(percent: int) -> str:
    return f"{percent}% replay text" if percent else "no replay text"


def _review(name: str, label: str, kept: float = 0, gamma: float = 0.1, start: str = NEW_STAGE1) -> Setting:
    """Review, after stage 1 with new experts only or another, `kept` of its text being kept text."""
    blend = BLENDS["stage2"] | ({"kept": 3 * kept / (1 - kept)} if kept else {})
    options = () if gamma == 0.1 else ("--lpr-loss-coeff", f"{gamma:g}")
    training = Training("stage2", start, blend, share=REVIEW_SHARE, options=options)
    return Setting(name, label, (start,), is_extra=True, training=training)


def _calibrated(name: str, label: str, run: str = LONG_STAGE1, options: str = "", pack: str = OTHER) -> Setting:
    """Stage 1 with new experts only, then calibrated routers instead of review."""
    calibrated = Calibrated(run, tuple(options.split()), pack)
    return Setting(name, f"{NEW}, {label}", (run,), is_extra=True, calibrated=calibrated)


INSTEAD = "calibrated routers instead of review"
# What a reviewer would try instead, and what might be better: each is only trained if --only names it.
RIVALS = (
    Setting(
        NEW_STAGE1,
        f"{NEW}, before review",
        is_extra=True,
        training=Training("stage1", "upcycled-copies", {"expanded": 1}, share=1, options=("--stage1-experts", "new")),
    ),
    *(
        Setting(
            f"{LONG_STAGE1}{name}",
            f"{NEW}, with review's tokens in it, too{_variant(name)}",
            is_extra=True,
            training=Training(
                "stage1", "upcycled-copies", {"expanded": 1}, rate, options=("--stage1-experts", "new"), seed=seed
            ),
        )
        for name, rate, seed in LONG
    ),
    _review("new", NEW),
    _review("new-gamma-0.3", f"{NEW}, \u03b3 0.3", gamma=0.3),
    *(
        _review(f"copies-kept-{n}", f"MoE-LPR, {n}% kept text in review", n / 100, start=STAGE1_OF["copies"])
        for n in (5, 25)
    ),
    *(_review(f"new-kept-{n}", f"{NEW}, {n}% kept text in review", kept=n / 100) for n in (1, 5, 25)),
    Setting(
        "one-stage",
        "MoE-LPR, both stages at once",
        is_extra=True,
        training=Training("stage1", "upcycled-copies", _replay(10), options=("--lpr-loss-coeff", "0.1")),
    ),
    *(
        Setting(
            f"full-{percent}-{rate:g}{name}",
            f"full fine-tuning, {_with(percent)}, rate {rate:g}{_variant(name)}",
            is_extra=True,
            training=Training("dense", "dense", _replay(percent), rate, seed=seed),
        )
        for percent in (0, 1, 10)
        for rate in (1e-4, 3e-4)
        for name, seed in (("", 1), *((f"-seed-{seed}", seed) for seed in SEEDS[1:] if (percent, rate) == (10, 3e-4)))
    ),
    Setting(
        "full-10-longer",
        f"full fine-tuning, 10% replay text, {TIMES_LONGER:g} times the tokens, which take about as long as MoE-LPR",
        is_extra=True,
        training=Training("dense", "dense", _replay(10), 3e-4, share=TIMES_LONGER * (1 + REVIEW_SHARE)),
    ),
    *(
        Setting(
            f"{LORA_16}-{percent}-{rate:g}",
            f"LoRA, rank 16, {_with(percent)}, rate {rate:g}",
            is_extra=True,
            training=Training("lora", BASE, _replay(percent), rate),
        )
        for percent in (0, 1, 10)
        for rate in (1e-3, 3e-3)
    ),
    *(
        Setting(
            f"ffn-{percent}",
            f"only the FFNs fine-tuned, {_with(percent)}",
            is_extra=True,
            training=Training("ffn", BASE, _replay(percent), 3e-4),
        )
        for percent in (0, 10)
    ),
    Setting(
        "new-calibrated",
        f"{NEW}, calibrated routers",
        (NEW_STAGE1, "new"),
        is_extra=True,
        calibrated=Calibrated("new"),
    ),
    *(
        _calibrated(f"{LONG_CALIBRATED}{name}", f"{INSTEAD}{_variant(name)}", f"{LONG_STAGE1}{name}")
        for name, *_ in LONG
    ),
    *(
        _calibrated(
            f"{FAR}{name}",
            f"{INSTEAD}, --max-distance {MAX_DISTANCE:g}{_variant(name)}",
            f"{LONG_STAGE1}{name}",
            f"--max-distance {MAX_DISTANCE:g}",
        )
        for name in SEED_NAMES
    ),
    _calibrated("long-calibrated-80", f"{INSTEAD}, --keep-original 0.8", options="--keep-original 0.8"),
    _calibrated(KNOWN, f"{INSTEAD}, the eight languages among the kept text", pack=OTHER_KNOWN),
    _calibrated("long-calibrated-replayed", f"{INSTEAD}, only the replayed languages as kept text", pack=""),
    *(
        _calibrated(
            f"{LONG_CALIBRATED}-{number}", f"{INSTEAD}, {number} tokens of each text", options=f"--max-tokens {number}"
        )
        for number in AMOUNTS
    ),
    Setting(
        TOP3_STAGE1,
        f"{NEW}, three choices per token, before calibration",
        is_extra=True,
        training=Training("stage1", "upcycled-top-3", {"expanded": 1}, options=("--stage1-experts", "new")),
    ),
    _calibrated("top-3-calibrated", f"three choices per token, {INSTEAD}", TOP3_STAGE1),
    Setting(
        "copies-calibrated",
        "MoE-LPR, K copies, calibrated routers",
        (STAGE1_OF["copies"], f"copies-seed-{SEEDS[0]}"),
        is_extra=True,
        calibrated=Calibrated(f"copies-seed-{SEEDS[0]}"),
    ),
    Setting(HALFWAY, "halfway between base and full fine-tuning, 10% replay text", (HALFWAY_OF,), is_extra=True),
    Setting(NEAR, "35% of the way from base to full fine-tuning, 10% replay text", (HALFWAY_OF,), is_extra=True),
    Setting(LORA_SWITCHED, "LoRA, rank 16, on for expanded languages only", (SWITCHED,), is_extra=True),
)

SETTINGS = _by_name(
    Setting(BASE, "base"),
    Setting("copies-stage1", "MoE-LPR, K copies, stage 1"),
    Setting("copies", "MoE-LPR, K copies", ("copies-stage1",), len(SEEDS)),
    Setting("full", "full fine-tuning"),
    Setting("lora", "LoRA, largest rank"),
    Setting("one-copy-stage1", "MoE-LPR, 1 copy (the paper), stage 1"),
    Setting("one-copy", "MoE-LPR, 1 copy (the paper)", ("one-copy-stage1",), len(SEEDS)),
    Setting("no-lpr", "1 copy, no LPR loss", ("one-copy-stage1",), len(SEEDS)),
    Setting("random", "1 copy, new experts random", ("random-stage1",)),
    Setting("reference", "1 copy, reference LPR loss", ("one-copy-stage1",), len(SEEDS)),
    Setting("plain", "plain MoE, everything trained"),
    *(
        Setting(name, f"MoE-LPR, K copies, {times} times the tokens", (f"{name}-stage1",), is_extra=True)
        for name, times in MORE_TEXT.items()
    ),
    Setting(REPLAY, "full fine-tuning, replay text mixed in", is_extra=True),
    Setting(LORA_16, "LoRA, rank 16", is_extra=True),
    *RIVALS,
)
CALIBRATED = {setting.name: setting.calibrated for setting in RIVALS if setting.calibrated}
# Models that are evaluated on what neither training nor replay contains.
UNSEEN = {
    SETTINGS[name].models[0]
    for name in (BASE, "copies-stage1", "copies", "full", "lora", "one-copy", REPLAY, LORA_16, *_by_name(*RIVALS))
}
# MoE-LPR with K copies and new tokens. SAME_BYTES has read as much text as MoE-LPR without them has, SAME_TOKENS
# as many tokens, which takes about the same time.
VOCABULARY_START, SAME_BYTES, SAME_TOKENS = "vocabulary-start", "vocabulary-bytes", "vocabulary-tokens"
VOCABULARY = _by_name(
    Setting(VOCABULARY_START, "extended vocabulary, before training"),
    *(
        Setting(name, f"extended vocabulary, {what}", (f"{name}-stage0", f"{name}-stage1"))
        for name, what in ((SAME_BYTES, "same bytes"), (SAME_TOKENS, "same tokens"))
    ),
)
ALL = SETTINGS | VOCABULARY


def users_of_model(model: str) -> set[str]:
    """The settings whose numbers are those of a model."""
    found = {setting.name for setting in ALL.values() if model in setting.models}
    return found | ({LORA_SWITCHED} if model == SWITCHED else set())


def users_of(run: str) -> set[str]:
    """The settings of the table that need a conversion or a run."""
    start = {setting.name for setting in RIVALS if setting.training and setting.training.start == run} | {run}
    return {setting.name for setting in RIVALS if start & {setting.name, *setting.before}}


def calibrated_of(run: str) -> set[str]:
    """The settings whose models are a run's export with calibrated routers."""
    return {name for name, calibrated in CALIBRATED.items() if calibrated.run == run}


def steps_of(tokens: float) -> int:
    return max(2, round(tokens / STEP_TOKENS))


def schedule(steps: int, rate: float) -> list[str]:
    """The trainer's flags for a number of steps and the highest learning rate."""
    return (
        f"--train-iters {steps} --lr {rate:g} --min-lr {minimum_rate(rate):g} --lr-decay-style cosine "
        f"--lr-warmup-iters {warmup_steps(steps)}"
    ).split()


def warmup_steps(steps: int) -> int:
    return max(1, steps // 16)


def minimum_rate(rate: float) -> float:
    """The rate at the end of the cosine."""
    return rate / 10


def model_folder(run: Path, base: Path, model: str) -> Path:
    """What is evaluated: a Hugging Face directory of dense models that the trainer hasn't made, else a checkpoint."""
    is_hf = model.startswith(("lora", "search-lora", "ffn", *MEANS, *CALIBRATED))
    return base if model == BASE else run / f"{model}-hf" if is_hf else run / model
