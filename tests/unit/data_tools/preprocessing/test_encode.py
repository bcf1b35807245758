"""Every token of a text gets one bit, and the workers end with the job."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.preprocessing.encode import Encoder, Tally
from data_tools.preprocessing.parsing import DocumentParser, Text
from data_tools.preprocessing.tagging import LanguageGroups, LanguageSpans, TaggedText
from moelpr.data.tokenizers.base import Tokenizer
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.unit.data_tools.preprocessing.conftest import spans


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer: Path) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from("ab")), max_size=6))
def test_any_spans_tag_every_token_once(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> None:
    groups = LanguageGroups(frozenset("a"), frozenset())
    tagger = LanguageSpans("spans", groups)
    encoder = Encoder(tokenizer, 500, [0], [], 1, DocumentParser(tagger, [["text"]]), groups, ["text"])
    [text] = tagger.texts(spans(*pairs), 0, ["text"])
    tally = Tally()
    prepared = [Text(text), Text(TaggedText("x", [("b", 1)]))]
    documents = encoder.documents(prepared, "text", tally)
    assert isinstance(documents.tokens, np.ndarray)
    assert (documents.runs >> 1).sum() == len(documents.tokens) == documents.lengths.sum()
    assert (documents.runs >> 1 > 0).all() and (np.diff(documents.runs & 1) != 0).all()
    assert sum(count.tokens for count in tally.corpus("text").languages.values()) == len(documents.tokens)
    whole = tokenizer.encode(["".join(text for text, _ in pairs)]).ids
    assert documents.tokens[: documents.lengths[0]].tolist() == [0, *whole.tolist(), 1]
