"""What is compared on the real model, and how each setting is trained.

A setting is one way to train, and has one model per seed. All read the same text in the same order, in steps of 1,024
tokens: TOKENS in stage 1, full fine-tuning and LoRA, REVIEW_SHARE of that in stage 2; but those of MORE_TEXT read more,
and REPLAY all at once. The settings of VOCABULARY have new tokens, and are compared with each other and with one of
SETTINGS.
"""

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
# Rates of which the best for the expanded languages is searched, on a validation part of the text. Full fine-tuning and
# LoRA get it; for MoE-LPR, the search tells whether that of STAGE_RATES is as good.
RATES = {
    **dict.fromkeys(("full", "copies"), (1e-4, 3e-4, 1e-3)),
    **dict.fromkeys(("lora", LORA_16), (1e-4, 3e-4, 1e-3, 3e-3)),
}
BETA2 = 0.95
SEEDS = (1, 2, 3)

# With new tokens: stage 0 gets a fraction of the tokens of stage 1, and stage 1 the others.
NUM_NEW_TOKENS, STAGE0_SHARE = 8000, 0.2

# MoE-LPR that reads more: is it the tokens that it lacks? Setting -> times the tokens of the others.
MORE_TEXT = {"copies-twice": 2, "copies-three-times": 3}
# Full fine-tuning on what MoE-LPR reads in both stages, at once: is it the replay text that it lacks?
REPLAY, REPLAY_BLEND = "full-replay", {"original": 1, "expanded": 10}
BASE, STAGE1_OF = "base", {"copies": "copies-stage1", "one-copy": "one-copy-stage1", "random": "random-stage1"}


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: Name of the setting.
        label: Name on the page.
        before: The runs that its models continue, in order; () if they start from the base.
        seeds: Number of models, which differ in the order of the text.
        is_extra: Whether it is only trained if --only names it.
    """

    name: str
    label: str
    before: tuple[str, ...] = ()
    seeds: int = 1
    is_extra: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """Names of its models, of their run folders and of their results."""
        return tuple(f"{self.name}-seed-{seed}" for seed in SEEDS[: self.seeds]) if self.seeds > 1 else (self.name,)

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that its first model took; () if it is not trained."""
        return () if self.name in (BASE, VOCABULARY_START) else (*self.before, self.models[0])


def _by_name(*settings: Setting) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


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
)
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
    return base if model == BASE else run / f"{model}-hf" if model.startswith(("lora", "search-lora")) else run / model
