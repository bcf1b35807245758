"""Scripts in the place of programs that tests do not want to start."""

from collections.abc import Mapping
from pathlib import Path

import pytest


def write_program(path: Path, body: str) -> Path:
    """Write a shell script that can be started."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, programs: Mapping[str, str]) -> Path:
    """Put scripts into a folder before all others on PATH; STUBS names the folder."""
    for name, body in programs.items():
        write_program(folder / name, body)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("STUBS", str(folder))
    return folder
