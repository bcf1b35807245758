from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.data.text.language_id import UNDETECTED, load_identifier
from tests.support.fasttext_model import write_fasttext_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fasttext_model(tmp_path / "lid.bin", {"sea": "eng_Latn", "θάλασσα": "ell_Grek"})


def test_a_fasttext_model_says_the_canonical_code_or_that_it_is_uncertain(model: Path) -> None:
    identifier = load_identifier(str(model), frozenset({"el"}), min_confidence=0.6)
    texts = "θάλασσα\nθάλασσα", "sea", "sea θάλασσα"
    assert [identifier.language(text) for text in texts] == ["el", "en", UNDETECTED]


@pytest.mark.parametrize(
    ("name", "languages", "message"),
    [
        ("nosuch.bin", "el", "no model nosuch.bin"),
        (__file__, "el", "no fastText model"),
        ("{model}", "fr", "does not know fr"),
        ("py3langid", "quc", "does not support language quc"),
    ],
)
def test_a_wrong_model_or_language_is_one_sentence(model: Path, name: str, languages: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_identifier(name.format(model=model), frozenset({languages}), 0.5)
