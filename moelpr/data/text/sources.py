"""Files of text: which ones a name, a folder or a pattern means, and their form."""

import glob
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple, NoReturn

from moelpr.base.command import check_is_utf8
from moelpr.base.errors import UserError
from moelpr.data.text import remote
from moelpr.data.text.held_out_text import is_held_out_text

STANDARD_INPUT = "-"
# Files to look for in a folder; a file that is named explicitly may have any name.
_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
_PACKED = (".gz", ".zst", ".bz2", ".parquet")
_SUFFIXES = (*_TEXT_SUFFIXES, *(a + b for a in _TEXT_SUFFIXES for b in _PACKED[:-1]), _PACKED[-1])
# A folder or file of a split, such as train, test-00000-of-00002-8c1f.parquet or el-test.jsonl.
_SPLIT = re.compile(
    r"(?P<of>(?:.*[-_.])?)(?P<split>train|test|validation|valid|val|dev|eval)"
    r"(?:[-_.]?\d+(?:[-_.]of[-_.]\d+)?(?:-[0-9a-f]+)?)?(?:\.[a-z][a-z0-9]*)*"
)
_SHOWN_NAMES = 3
_MANIFEST_SUFFIX = ".manifest.json"  # a corpus may have been written into the folder


class Form(StrEnum):
    """Format of a file, detected by its first bytes, not by its name."""

    LINES = "JSON lines"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    PARQUET = "Parquet"
    STREAM = "standard input"


_MAGIC = {b"\x1f\x8b": Form.GZIP, b"\x28\xb5\x2f\xfd": Form.ZSTD, b"BZh": Form.BZIP2, b"PAR1": Form.PARQUET}


class Source(NamedTuple):
    """An input file."""

    path: str  # as it was found; of a remote file, without what is secret
    form: Form
    bytes: int  # file size; 0 for standard input
    dataset: int = 0  # index of the dataset that the file belongs to
    sha1: str | None = None  # expected checksum, from a registry; None if it states none
    uri: str | None = None  # the URI of a remote file; None if it is a local one
    version: str | None = None  # the checksum or ETag that identifies a remote file's content
    copy: str | None = None  # the local copy of a remote file; None before `download`

    @property
    def is_local(self) -> bool:
        """Whether the file or a copy of it is on this machine."""
        return self.uri is None or self.copy is not None

    @property
    def file(self) -> str:
        """The local file."""
        return self.copy or self.path

    def open(self) -> BinaryIO:
        """Open the file, also where it is remote."""
        return open(self.file, "rb") if self.is_local else remote.open_remote(self.uri or "")


def find_files(names: list[str]) -> list[str]:
    """Expand names of files, folders and glob patterns, which may be URIs: in the given order, sorted within each.

    Of a folder with several splits, as data sets on hubs have them (train, test), only what is to be trained on is
    read; so a note on standard error says.

    Raises:
        UserError: A folder or pattern matches no file.
    """
    uris: list[str] = []
    left_out: list[str] = []
    for name in names:
        is_remote = remote.is_remote(name)
        if is_remote:
            name = remote.pinned(name)
        elif re.match(r"\w+:/", name) and not os.path.isdir(name.partition("/")[0]):
            raise UserError(f"there is no file {remote.shown(name)}; URIs begin with hf://, s3://, gs:// or https://")
        # In a URL, a question mark begins the query.
        is_pattern = glob.has_magic(remote.shown(name) if is_remote else name) and not os.path.lexists(name)
        if name == STANDARD_INPUT or os.path.isfile(name):
            uris.append(name)
        elif os.path.isdir(name) or (is_remote and not is_pattern and remote.is_folder(name)):
            if not (files := sorted(_files_below(name, left_out))):
                types = ", ".join(_TEXT_SUFFIXES)
                where = remote.shown(name)
                raise UserError(f"the folder {where} contains no {types} (.gz, .zst, .bz2) or .parquet file")
            uris += files
        elif is_pattern:
            if not (files := remote.matches(name) if is_remote else _matches(name)):
                raise UserError(f"no file matches {remote.shown(name)}; check the pattern and the current folder")
            uris += files
        else:
            uris.append(name)  # opening it reports what is wrong
    if left_out:
        more = f" and {len(left_out) - _SHOWN_NAMES:,} more" if len(left_out) > _SHOWN_NAMES else ""
        shown = ", ".join(map(remote.shown, sorted(left_out)[:_SHOWN_NAMES])) + more
        print(f"note: not text to train on, so not read unless it is named: {shown}", file=sys.stderr)
    return uris


def named_files(paths: list[str], what: str) -> dict[str, str]:
    """Name → file of all that `find_files` finds; the name is the file's, without its endings.

    Raises:
        UserError: As `find_files`, or two files have one name; the message calls the paths `what`.
    """
    by_name: dict[str, str] = {}
    for path in find_files(paths):
        name = PurePath(path).name.partition(".")[0]
        if name in by_name:
            raise UserError(f"{what} has two files named {name} ({by_name[name]} and {path}); name them yourself")
        by_name[name] = path
    return by_name


def _matches(pattern: str) -> list[str]:
    _check_folders_of(pattern)
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _files_below(folder: str, left_out: list[str]) -> Iterator[str]:
    """Files with text in a folder and the folders in it, links included, but hidden ones and corpora's manifests.

    Adds to `left_out` what is not to be trained on.
    """
    for path, names in _walk(folder, left_out):
        texts = [name for name in names if name.endswith(_SUFFIXES) and not name.startswith(".")]
        others = _not_to_train_on(texts)
        for name in texts:
            file = os.path.join(path, name)
            is_of_corpus = name.endswith(_MANIFEST_SUFFIX) or is_held_out_text(Path(file))
            if not is_of_corpus and (remote.is_remote(file) or os.path.isfile(file)):
                if name in others:
                    left_out.append(file)
                else:
                    yield file


def _not_to_train_on(names: list[str]) -> set[str]:
    """Return the names of other splits, if that of the training split is there too, and those of removed text."""
    splits = {name: match for name in names if (match := _SPLIT.fullmatch(name.lower()))}
    with_training = {match["of"] for match in splits.values() if match["split"] == "train"}
    others = {name for name, match in splits.items() if match["split"] != "train" and match["of"] in with_training}
    return others | {name for name in names if name.lower().endswith("_removed")}


def _check_folders_of(pattern: str) -> None:
    """List the folders that a pattern may lead to, because `glob` omits those that it can't read."""
    *folders, name = Path(pattern).parts
    parents = [Path(pattern).anchor or "."]
    for part in folders[bool(Path(pattern).anchor) :]:
        if part == "**":
            parents = [path for folder in parents for path, _ in _walk(folder)]
        elif glob.has_magic(part):
            parents = [path for folder in parents for path in _listed(folder) if fnmatch(os.path.basename(path), part)]
        else:
            parents = [os.path.join(folder, part) for folder in parents]
        parents = [path for path in parents if os.path.isdir(path)]
    for folder in parents if glob.has_magic(name) else ():
        _listed(folder)
        if name == "**":
            list(_walk(folder))


def _listed(folder: str) -> list[str]:
    try:
        return [os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        _refuse_folder(error)


def _walk(top: str, left_out: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names in it, links included; hidden folders and second names of a folder are left out.

    So are folders with text that is not to be trained on, which are added to `left_out`; None: they are not.
    """
    seen = set()
    tree = remote.walk(top) if remote.is_remote(top) else os.walk(top, onerror=_refuse_folder, followlinks=True)
    for path, folders, names in tree:
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if left_out is not None and (others := _not_to_train_on(folders)):
            left_out += [os.path.join(path, name, "") for name in others]
            folders[:] = [name for name in folders if name not in others]
        if real not in seen:  # otherwise a link to a folder around it, or a second one
            seen.add(real)
            yield path, names


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"the folder {error.filename} can't be read ({error.strerror}); correct its permissions, or name files to read"
    ) from error


def open_source(path: str, dataset: int = 0, sha1: str | None = None) -> Source:
    """Detect the form of a file. Opens it once, so that errors show before the work starts.

    A remote file is not downloaded yet, unless its server sends it only whole.
    """
    if path == STANDARD_INPUT:
        return Source(path, Form.STREAM, 0, dataset)
    check_is_utf8(path, "input")
    if remote.is_remote(path):
        uri, path = path, remote.shown(path)
        identity = remote.identify(uri)
        form = _form(path, remote.first_bytes(uri, 8))
        source = Source(path, form, identity.bytes, dataset, None, uri, identity.version)
        if remote.has_ranges(uri, identity.bytes):
            return source
        copy = remote.download({uri: identity})[uri]
        return source._replace(bytes=os.path.getsize(copy), copy=copy)
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            # The size of a pipe is unknown, and it can be read only once.
            raise UserError(f"the input {path} is not a file; pass its text to standard input, with --input -")
        with open(path, "rb") as file:
            start = file.read(8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"the input {path} can't be read ({error.strerror}); pass JSON lines or Parquet files"
        ) from error
    return Source(path, _form(path, start), size, dataset, sha1)


def download(sources: Sequence[Source]) -> list[Source]:
    """Return sources with local copies of the remote files, which are downloaded unless they are there."""
    missing = {
        source.uri: remote.Identity(source.bytes, source.version)
        for source in sources
        if source.uri and not source.is_local
    }
    copies = remote.download(missing)
    return [source._replace(copy=copies[source.uri]) if source.uri in missing else source for source in sources]


def _form(path: str, start: bytes) -> Form:
    """The form of a file by its first bytes."""
    if start.startswith(b"\xfd7zXZ\0"):
        raise UserError(f"the input {path} is packed with xz; unpack it, or pass the output of xz -dc to --input -")
    form = next((form for magic, form in _MAGIC.items() if start.startswith(magic)), Form.LINES)
    is_packed = form is not Form.LINES or not path.endswith(_PACKED) or not start or b"{" in start
    if start.startswith(b"version ") or not is_packed:
        raise UserError(f"the input {path} is damaged, or only a pointer of Git LFS; fetch it again (git lfs pull)")
    encoding = json.detect_encoding(start) if form is Form.LINES and start.strip(b"\0") else "utf-8"
    if not encoding.startswith("utf-8"):
        raise UserError(f"the input {path} is {encoding.upper()}; convert it to UTF-8, for example with iconv")
    return form
