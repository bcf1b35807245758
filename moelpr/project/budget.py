"""The tokens of the stage that has the budget: what it allows and the text gives, and how languages share them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from moelpr.base.errors import UserError
from moelpr.data.mixing import Share
from moelpr.data.text.estimate import estimate
from moelpr.data.text.filters import Filter
from moelpr.project.mixing import mix
from moelpr.project.places import Places
from moelpr.project.reading import found_text, text_bytes
from moelpr.project.steps import LENGTH_FLAGS, stage_flags

# Estimates of tokens may be so much too low.
_MARGIN = 1.2


def check_budget(places: Places) -> None:
    """Check the budget against a step, and against the text as far as its tokens are known.

    Raises:
        UserError: It is less than one step, text would be read more often than its cap, or the base is missing.
    """
    places.config_folder()  # the Hub has it, and can be reached
    is_made = all(places.manifest(code).is_file() for code in places.blended)
    tokens = {} if places.project.corpora else tokens_of(places) if is_made else _at_most(estimated_tokens(places))
    if not places.project.corpora:
        shares(places, tokens)
    elif places.project.budget.epochs:  # the trainer counts the tokens
        return
    total, step = total_tokens(places, tokens), _step_tokens(places)
    if total < step:
        raise UserError(
            f"{places.file.at('budget')}budget: {total:,} tokens are less than one step of {places.main_stage}, "
            f"{step:,} tokens; raise it, add text, or lower steps.{places.main_stage}.global-batch-size"
        )


def _at_most(tokens: Mapping[str, int]) -> dict[str, int]:
    """Estimates of tokens, as high as they may really be."""
    return {code: round(_MARGIN * number) for code, number in tokens.items()}


def _step_tokens(places: Places) -> int:
    """The tokens of a step of the main stage; 0 if its flags do not say, or state its length."""
    own = places.own(places.main_stage)
    flags = stage_flags(places.main_stage, own)
    try:
        return 0 if LENGTH_FLAGS & own.keys() else int(flags["global-batch-size"]) * int(flags["seq-length"])
    except (KeyError, ValueError):  # the trainer says what is wrong
        return 0


def tokens_of(places: Places) -> dict[str, int]:
    """The tokens of the corpora that the main stage reads.

    Raises:
        UserError: One is not there.
    """
    return {code: places.tokens(code) for code in places.blended}


@cache
def estimated_tokens(places: Places) -> dict[str, int]:
    """The tokens of the languages that the main stage reads, estimated from samples of their text.

    Without a tokenizer that can be read, as before the base is downloaded, a token counts as four bytes of the files.
    """
    found = {}
    has_tokenizer = any((places.base / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    for code in places.blended:
        language = places.languages[code]
        if has_tokenizer:
            found[code] = estimate(
                found_text(*language.text),
                language.json_key,
                places.base,
                Filter(language.filter) if language.filter else None,
            ).tokens
        else:
            found[code] = text_bytes(language) // 4
    return found


def total_tokens(places: Places, tokens: Mapping[str, int]) -> int:
    """The tokens of the main stage, given those of the languages."""
    budget = places.project.budget
    if budget.tokens:
        return budget.tokens
    if budget.epochs:
        return round(budget.epochs * sum(tokens[code] for code in places.expanded) / (1 - places.project.mix.replay))
    assert budget.hours is not None
    speed = places.layouts.of(places.main_stage).tokens_per_s
    if speed is None:
        raise UserError(
            f"{places.file.at('budget', 'hours')}budget.hours requires GPUs whose speed is predicted; state "
            "budget.tokens or budget.epochs"
        )
    return round(3600 * budget.hours * speed)


def shares(places: Places, tokens: Mapping[str, int]) -> dict[str, Share]:
    """How languages share the main stage, given the tokens of each: the expanded ones, and with replay all."""
    replay, total = places.project.mix.replay, total_tokens(places, tokens)
    found: dict[str, Share] = {}
    try:
        for group, codes, part in (("expanded", places.expanded, 1 - replay), ("original", places.original, replay)):
            languages = {code: places.languages[code] for code in codes if part}
            available = {code: tokens[code] for code in languages}
            shared = mix(languages, available, part * total, places.project.mix.temperature, group)
            found |= {code: replace(share, weight=part * share.weight) for code, share in shared.items()}
        return found
    except UserError as error:
        key = str(error).split(":")[0].split(".")
        raise UserError(
            f"{places.file.at(*key)}{error}" if key[0] in ("languages", "budget", "mix") else str(error)
        ) from None
