"""The tokens of the main stage: what the budget allows and the text gives, and how languages share them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache

from moelpr.base.errors import UserError
from moelpr.base.quantities import format_count
from moelpr.data.mixing import Share, divide
from moelpr.data.text.estimate import estimate
from moelpr.data.text.filters import Filter
from moelpr.project.file import found_text, text_bytes
from moelpr.project.project import Language
from moelpr.project.resolved import ResolvedProject

# Estimates of tokens may be so much too low; those by the size of files, which may be compressed, by more.
_MARGIN, _MARGIN_OF_SIZES = 1.2, 6
_TRIAL_STEPS = 20  # steps that a trial with little text should have
# A user who sets one of these for a stage decides how long it trains.
LENGTH_FLAGS = frozenset(("train-tokens", "train-epochs", "train-iters"))


def check_budget(project: ResolvedProject) -> None:
    """Check the budget against a step, and against the text as far as its tokens are known.

    Raises:
        UserError: It is less than one step, text would be read more often than its cap, or the base is missing or
            cannot have such experts or the difference of the chat model.
    """
    _ = project.layouts.result
    project.layouts.check_chat()
    if project.content.corpora and project.content.budget.epochs:  # the trainer counts the tokens
        return
    for part in project.parts:
        tokens: dict[str, int] = {}
        if not project.content.corpora:
            expected_shares(project, part)
            tokens = _most_tokens(project, part)
        _check_step(project, "budget", part, total_tokens(project, tokens))
    if project.replay and not project.content.corpora:
        epochs, step = project.replay.epochs, step_tokens(project, "stage2")
        if epochs * sum(_most_tokens(project, project.main_stage).values()) < step:  # else originals need no estimate
            total = epochs * sum(_most_tokens(project, "stage2").values())
            _check_step(project, "replay.epochs", "stage2", round(total))


def _check_step(project: ResolvedProject, key: str, part: str, total: int) -> None:
    stage = project.main_stage if part in project.parts else part
    if total < (step := step_tokens(project, stage)):
        length = int(project.stage_flags(stage)["seq-length"])
        gpus = cluster.gpus if (cluster := project.layouts.cluster) else 1
        batch = gpus * max(1, total // (_TRIAL_STEPS * length * gpus))
        trial = f", or for a trial set steps.{stage}: {{global-batch-size: {batch}, micro-batch-size: 1}}"
        raise UserError(
            f"{project.file.at(*key.split('.'))}{key}: {total:,} tokens, the most that are expected, are less than one "
            f"step of {part}, {step:,} tokens; raise it or add text{trial if batch * length <= total else ''}"
        )


def _most_tokens(project: ResolvedProject, stage: str) -> dict[str, int]:
    """The tokens of the languages that a training reads, or as many as estimates may mean."""
    tokens, is_estimate = tokens_or_estimates(project, stage)
    margin = (_MARGIN if _has_tokenizer(project) or project.file.assumed else _MARGIN_OF_SIZES) if is_estimate else 1
    return {code: round(margin * number) for code, number in tokens.items()}


def expected_shares(project: ResolvedProject, stage: str) -> dict[str, Share]:
    """How languages share a training, by corpora or estimates; an error names the estimate, not the most."""
    try:
        return shares(project, tokens_or_estimates(project, stage)[0])
    except UserError:
        with suppress(UserError):
            return shares(project, _most_tokens(project, stage))
        raise


def step_tokens(project: ResolvedProject, stage: str) -> int:
    """The tokens of a step of a stage; 0 if its flags do not say, or state its length."""
    if LENGTH_FLAGS & project.own(stage).keys():
        return 0
    flags = project.stage_flags(stage)
    return int(flags.get("global-batch-size", 0)) * int(flags.get("seq-length", 0))


def tokens_of(project: ResolvedProject, stage: str) -> dict[str, int]:
    """The tokens of the corpora that a training reads.

    Raises:
        UserError: One is not there.
    """
    return {code: project.tokens(code) for code in project.read_by(stage)}


def _has_tokenizer(project: ResolvedProject) -> bool:
    return any((project.base / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


@cache
def _estimate(project: ResolvedProject, code: str) -> int:
    """The tokens of a language by samples; without text or tokenizer, as before a download, one is four bytes."""
    if code in project.file.assumed or not _has_tokenizer(project):
        return text_bytes(project.file, code) // 4
    language = project.languages[code]
    kept = Filter(language.filter) if language.filter else None
    return estimate(found_text(*language.text), language.json_key, project.base, kept).tokens


def tokens_or_estimates(project: ResolvedProject, stage: str) -> tuple[dict[str, int], bool]:
    """The tokens of the languages that a training reads, and whether they are estimated."""
    try:
        return tokens_of(project, stage), False
    except UserError:  # a corpus is still to be made
        return {code: _estimate(project, code) for code in project.read_by(stage)}, True


def total_tokens(project: ResolvedProject, tokens: Mapping[str, int]) -> int:
    """The tokens of a training, given those of the languages that it reads."""
    budget = project.content.budget
    if budget.tokens:
        return budget.tokens
    if budget.epochs:
        expanded = sum(number for code, number in tokens.items() if code in project.expanded)
        return round(budget.epochs * expanded / (1 - project.content.mix.replay))
    assert budget.hours is not None
    speed = project.layouts.of(project.main_stage).tokens_per_s
    if speed is None:
        raise UserError(
            f"{project.file.at('budget', 'hours')}budget.hours requires GPUs whose speed is predicted, under "
            "hardware, and no low-rank training; name some, or state budget.tokens or budget.epochs"
        )
    return round(3600 * budget.hours * speed)


def shares(project: ResolvedProject, tokens: Mapping[str, int]) -> dict[str, Share]:
    """How languages share a training, given the tokens of each: its expanded ones, and with replay the originals."""
    replay, total = project.content.mix.replay, total_tokens(project, tokens)
    shares: dict[str, Share] = {}
    try:
        for group, codes, part in (("expanded", project.expanded, 1 - replay), ("original", project.original, replay)):
            languages = {code: project.languages[code] for code in codes if part and code in tokens}
            available = {code: tokens[code] for code in languages}
            shared = mix(languages, available, part * total, project.content.mix.temperature, group)
            shares |= {code: replace(share, weight=part * share.weight) for code, share in shared.items()}
        return shares
    except UserError as error:
        key = str(error).split(":")[0].split(".")
        place = project.file.at(*key) if key[0] in ("languages", "budget", "mix") else ""
        longest = min((language.max_epochs for language in languages.values()), default=0)
        is_in_tokens = key[0] != "budget" or project.content.budget.tokens
        hint = "" if is_in_tokens else f"; the longest is budget: {{epochs: {longest:g}}}"
        language = f" (stage of {next(iter(tokens))})" if project.content.experts.per_language else ""
        raise UserError(f"{place}{error}{hint}{language}") from None


def mix(
    languages: Mapping[str, Language],
    tokens: Mapping[str, int],
    total: float,
    temperature: float,
    group: str = "expanded",
) -> dict[str, Share]:
    """Divide a budget over languages.

    With a temperature, a language that would be read more often than its cap gives what is too much to the others.

    Args:
        tokens: What there is of each language.
        total: Tokens of stage 1.
        temperature: Exponent of the sizes, unless the languages have weights.
        group: Key of the languages.

    Raises:
        UserError: A language without text, only some with weights, or a cap that cannot be kept.
    """
    weighted = [code for code, language in languages.items() if language.weight is not None]
    if missing := [code for code in languages if not tokens[code]]:
        raise UserError(f"languages.{group}.{missing[0]}: its text has no tokens; add text, or remove the language")
    if weighted and len(weighted) < len(languages):
        other = next(code for code in languages if code not in weighted)
        raise UserError(
            f"languages.{group}.{other}: it has no weight, but {weighted[0]} has one; give all languages a weight, or "
            "none, so that mix.temperature decides"
        )
    size = {code: language.weight or tokens[code] ** temperature for code, language in languages.items()}
    most = {code: language.max_epochs for code, language in languages.items()}
    try:
        parts = divide(tokens, total, size, most)
    except UserError as error:
        raise UserError(
            f"{'budget' if group == 'expanded' else 'mix.replay'}: {error} of {', '.join(tokens)}"
        ) from None
    if weighted and (capped := sorted(code for code, one in parts.items() if one.is_capped)):
        code = capped[0]
        epochs = total * size[code] / sum(size.values()) / tokens[code]
        raise UserError(
            f"languages.{group}.{code}.weight: its {format_count(tokens[code])} tokens would be read {epochs:.3g} "
            f"times, more than its max_epochs {most[code]:g}; lower its weight, add text, or raise max_epochs"
        )
    return parts
