import math

import pytest

from moelpr.training.validation import HeldOut, result


def test_a_loss_is_told_in_bits_per_byte_or_per_token_where_bytes_are_not_known() -> None:
    known, unknown = (HeldOut("el", "expanded", None, 2, bytes_per_token) for bytes_per_token in (2.5, None))
    found = result(known, loss=3.0)
    assert found == {"group": "expanded", "lm_loss": 3.0, "bits_per_byte": pytest.approx(3.0 / math.log(2) / 2.5)}
    assert result(unknown, loss=3.0)["bits_per_token"] == pytest.approx(3.0 / math.log(2))
    assert result(known, loss=math.nan) == {"group": "expanded", "lm_loss": None, "bits_per_byte": None}
