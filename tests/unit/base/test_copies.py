from pathlib import Path

import pytest

from moelpr.base.copies import copy_folder
from moelpr.base.errors import UserError


def test_a_copied_folder_has_nothing_from_outside_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"LICENSE is a link to .*secret"):
        copy_folder(tmp_path / "hf", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
