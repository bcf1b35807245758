"""Shares of languages sum to the budget, and no text is read more often than its cap."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.base.errors import UserError
from moelpr.project.budget import mix
from moelpr.project.project import Language

sizes = st.dictionaries(st.sampled_from(["el", "hu", "tr", "is"]), st.integers(1, 10**12), min_size=1)


def languages(tokens: dict[str, int], **settings: float) -> dict[str, Language]:
    return {code: Language(text=["x"], **settings) for code in tokens}


@settings(deadline=None)  # other work may keep the machine busy
@given(sizes, st.floats(0, 1), st.floats(0.01, 1))
def test_shares_sum_to_the_budget_and_keep_the_caps(tokens, temperature, part) -> None:
    total = part * 4 * sum(tokens.values())
    shares = mix(languages(tokens), tokens, total, temperature)
    assert sum(one.weight for one in shares.values()) == pytest.approx(1)
    assert all(one.epochs <= 4 * (1 + 1e-6) for one in shares.values())
    assert all(one.epochs * one.tokens == pytest.approx(one.weight * total) for one in shares.values())
    free = [one for one in shares.values() if not one.is_capped]
    for one in free:  # without the capped ones, the rule holds
        expected = one.tokens**temperature / sum(other.tokens**temperature for other in free)
        assert one.weight / sum(other.weight for other in free) == pytest.approx(expected)


def test_the_temperature_goes_from_equal_shares_to_sizes() -> None:
    tokens = {"el": 9_000, "hu": 1_000}
    assert [mix(languages(tokens), tokens, 2_000, t)["el"].weight for t in (0, 0.5, 1)] == pytest.approx(
        [0.5, 0.75, 0.9]
    )


def test_a_capped_language_gives_the_rest_to_the_others() -> None:
    tokens = {"el": 100_000, "hu": 1_000}
    shares = mix(languages(tokens, max_epochs=2.0), tokens, 100_000, 0)
    assert shares["hu"].is_capped and shares["hu"].epochs == pytest.approx(2)
    assert shares["el"].weight == pytest.approx(0.98) and not shares["el"].is_capped


def test_weights_decide_unless_they_break_a_cap() -> None:
    tokens = {"el": 1_000, "hu": 1_000}
    chosen = {"el": Language(text=["x"], weight=3.0), "hu": Language(text=["x"], weight=1.0)}
    assert mix(chosen, tokens, 4_000, 0.3)["el"].weight == 0.75
    with pytest.raises(
        UserError, match="languages.expanded.el.weight: its 1K tokens would be read 4.5 times, more than"
    ):
        mix(chosen, tokens, 6_000, 0.3)
    with pytest.raises(UserError, match="languages.expanded.hu: it has no weight, but el has one"):
        mix(chosen | {"hu": Language(text=["x"])}, tokens, 4_000, 0.3)
    with pytest.raises(
        UserError, match="budget: 9K tokens would .* than max_epochs allows .*, or raise max_epochs of el, hu"
    ):
        mix(chosen, tokens, 9_000, 0.3)
    with pytest.raises(UserError, match="languages.expanded.hu: its text has no tokens"):
        mix(chosen, tokens | {"hu": 0}, 4_000, 0.3)
