"""Filters mean what pyarrow's expressions mean, for rows and for lines."""

import pickle

import pyarrow
import pyarrow.compute
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.base.errors import UserError
from moelpr.data.text.documents import BadLine
from moelpr.data.text.filters import Filter

score, lang, none = (pyarrow.compute.field(name) for name in ("score", "lang", "none"))
CONDITIONS = {
    "score >= 0.5": score >= 0.5,
    "0.5 > score": score < 0.5,
    "score == 1 or score != 0": (score == 1) | (score != 0),
    "lang in ['el', 'eu']": lang.isin(["el", "eu"]),
    "not (lang == 'el' and score < 0.5)": ~((lang == "el") & (score < 0.5)),
    "lang not in ('el',) and not is_null(lang)": ~lang.isin(["el"]) & lang.is_valid(),
    "is_null(score) or score <= -1": score.is_null() | (score <= -1),
    "score > 0 and (lang < 'f' or is_null(lang))": (score > 0) & ((lang < "f") | lang.is_null()),
}
scores, langs = st.sampled_from([-1.0, 0.0, 0.4, 0.5, 1.0]), st.sampled_from("el eu g".split())
rows = st.lists(st.fixed_dictionaries({"score": st.none() | scores, "lang": st.none() | langs}), max_size=12)


@pytest.mark.parametrize("text", CONDITIONS)
@settings(deadline=None, max_examples=50)
@given(rows=rows)
def test_a_filter_keeps_what_pyarrow_keeps(text: str, rows: list[dict[str, object]]) -> None:
    schema = pyarrow.schema({"score": pyarrow.float64(), "lang": pyarrow.string()})
    expected = pyarrow.Table.from_pylist(rows, schema).filter(CONDITIONS[text]).to_pylist()
    condition = pickle.loads(pickle.dumps(Filter(text)))  # workers get it so
    assert [row for row in rows if condition.keeps(row)] == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "score", "score >=", "score >= other", "f(score)", "score >= 0.5; import os", "__import__('os')"),
        *("score.x > 1", "score in 'abc'", "1 < score < 2", "score >= b'x'"),
        *("(" * 300 + "a > 1" + ")" * 300, "not " * 9000 + "a > 1"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="is no condition"):
        Filter(text)


def test_a_value_of_another_type_is_a_malformed_line() -> None:
    with pytest.raises(BadLine, match='"score" contains a string, which the filter compares with 0.5'):
        Filter("score > 0.5").keeps({"score": "high"})
