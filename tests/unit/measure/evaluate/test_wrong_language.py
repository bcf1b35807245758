import math

import pytest

from moelpr.data.text.language_id import load_identifier
from moelpr.measure.evaluate.wrong_language import MIN_CONFIDENCE, wilson, wrong_language

GREEK = "Η γρήγορη καφέ αλεπού πηδάει πάνω από τον τεμπέλη σκύλο κάθε πρωί."
ENGLISH = "The quick brown fox jumps over the lazy dog every single morning."
CODE = "for (int i = 0; i < 10; ++i) { x[i] += 0x3f * (y[i] - 17); } // 1 2 3 4 5 6 7 8 9"


def test_other_languages_are_wrong_and_short_text_and_code_are_undecided() -> None:
    identifier = load_identifier("py3langid", frozenset(), MIN_CONFIDENCE)
    texts = [GREEK, ENGLISH, "", "ναι", CODE, "12 34 56 78 90 12 34 56 78", GREEK.upper()]
    actual = wrong_language(identifier, {"el": {"model": texts, "the text itself": [GREEK]}, "code": {"model": [CODE]}})
    assert actual.keys() == {"el"}, "code is no language that can be identified"
    model, text = actual["el"]["model"], actual["el"]["the text itself"]
    assert (model.decided, model.undecided, model.rate.value) == (3, 4, pytest.approx(1 / 3))
    assert (text.decided, text.rate.value) == (1, 0)
    nothing = wrong_language(identifier, {"el": {"model": ["ναι"]}})["el"]["model"]
    assert nothing.decided == 0 and math.isnan(nothing.rate.value)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_that_of_published_tables(count: int, total: int, low: float, high: float) -> None:
    actual = wilson(count, total)
    assert (actual.low, actual.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
