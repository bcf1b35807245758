import json
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE, VocabularyExtension

EXTENSION = VocabularyExtension(10, [[1, 2], [9]], "huggingface:0", "1")


@pytest.mark.parametrize(
    "changes", [{"replaces": [[1, 10]]}, {"replaces": [[1], []]}, {"replaces": []}, {"first_new_id": 0}]
)
def test_values_out_of_range_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    EXTENSION.write(tmp_path)
    path = tmp_path / VOCABULARY_EXTENSION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=VOCABULARY_EXTENSION_FILE):
        VocabularyExtension.read(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moelpr data extend-tokenizer"):
        VocabularyExtension.read(tmp_path)
