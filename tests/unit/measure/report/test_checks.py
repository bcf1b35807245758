from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.report.checks import read_verifications


def test_verification_is_the_last_json_line_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "check-export.log"
    path.write_text('a warning\n{"equal": true, "num_tensors": 7, "max_abs_diff": null}\n')
    assert read_verifications([path]) == {"check-export": {"equal": True, "num_tensors": 7, "max_abs_diff": None}}
    for content in ("text", '{"other": 1}', '{"equal'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"check-export\.log: .*moelpr model verify A B --json"):
            read_verifications([path])
    path.write_text('{"equal": true, "num_tensors": 7}')
    with pytest.raises(UserError, match="another one"):
        read_verifications([path, path])
