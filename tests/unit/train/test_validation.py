import math
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.data.manifest import LanguageCount
from moelpr.train.validation import HeldOut, bytes_per_token, result
from tests.support.manifests import write_manifest


def test_a_loss_becomes_bits_per_byte_or_bits_per_token_if_bytes_are_unknown() -> None:
    known, unknown = (HeldOut("el", "expanded", None, 2, bytes_per_token) for bytes_per_token in (2.5, None))
    actual = result(known, loss=3.0)
    assert actual == {"group": "expanded", "lm_loss": 3.0, "bits_per_byte": pytest.approx(3.0 / math.log(2) / 2.5)}
    assert result(unknown, loss=3.0)["bits_per_token"] == pytest.approx(3.0 / math.log(2))
    assert result(known, loss=math.nan) == {"group": "expanded", "lm_loss": None, "bits_per_byte": None}


def test_bytes_per_token_come_from_the_manifest(tmp_path: Path) -> None:
    prefix = str(tmp_path / "corpus")
    assert bytes_per_token(prefix) is None
    el, en = LanguageCount("expanded", 1, 6, 30), LanguageCount("original", 1, 4, 12)
    write_manifest(Path(prefix), tokens=10, el=el, en=en)
    assert bytes_per_token(prefix) == 4.2
    Path(f"{prefix}.manifest.json").write_text('{"tokens": 10}')
    with pytest.raises(UserError, match="manifest.json"):
        bytes_per_token(prefix)
