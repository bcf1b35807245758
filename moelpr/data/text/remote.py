"""Files on the Hugging Face Hub, in object storage and on web servers, by fsspec: what a URI means, and local copies.

Credentials come from where the libraries look for them. Neither they nor a signed URL's query are in what is shown.
"""

import gc
import hashlib
import io
import ipaddress
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

from moelpr.base.errors import DISK_FULL, MachineError, UserError, first_line
from moelpr.base.files import atomic_file
from moelpr.base.secrets import without_secrets
from moelpr.base.versions import install_command

# Scheme of a URI -> how to log in; a name with one of these schemes is remote.
_SCHEMES = {
    "hf": "accept the data set's terms on the Hub if it has some, and run hf auth login or set HF_TOKEN",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run gcloud auth application-default login",
    "https": "renew the URL if it is signed, or put user and password into ~/.netrc",
}
_SCHEMES["http"] = _SCHEMES["https"]
# Waits between attempts to download a file; of finding one, which may be a typo, only the first.
_WAITS_S: tuple[float, ...] = (0.5, 2, 8, 32, 60)
_FIRST_WAITS = 2
_SAID_AFTER_S = 8
# Limits of listings: seconds for a folder, and folders.
_LISTING_S = 120.0
_MOST_FOLDERS = 100_000
_DOWNLOADS_AT_ONCE = 8
_BUFFER_BYTES = 1 << 18

_used: set[Any] = set()  # types of file systems


class Identity(NamedTuple):
    """Size and version of a remote file."""

    bytes: int  # its size; 0 if its server does not state it
    version: str | None  # the checksum or ETag that its server states, if any


def is_remote(name: str) -> bool:
    """Whether a name is a URI."""
    return _scheme(name) in _SCHEMES and "://" in name


def _scheme(uri: str) -> str:
    return uri.partition("://")[0].lower()


def _is_web(uri: str) -> bool:
    return _scheme(uri) in ("http", "https")


def shown(uri: str) -> str:
    """The part of a URI that may be shown and recorded: without login and query, which may be a signature."""
    return re.sub(r"[?#].*", "", without_secrets(uri), flags=re.DOTALL) if _is_web(uri) else without_secrets(uri)


def pinned(uri: str) -> str:
    """A URI whose content stays the same if the file system has revisions: the Hub's, with that of a commit.

    Raises:
        UserError: It contains a password, or the data set or its revision can't be read.
    """
    scheme, rest = _scheme(uri), uri.partition("://")[2]
    place = uri.partition("?")[0]  # a signed URL's query is hidden, not refused
    if "@" in rest.split("/")[0] or without_secrets(place) != place:
        raise UserError(f"{shown(uri)} contains a login or key; {_SCHEMES[scheme]}")
    if scheme != "hf":
        return f"{scheme}://{rest}"
    from huggingface_hub import HfApi

    with explained(uri):
        place = _persistently(uri, lambda system: system.resolve_path(rest), _FIRST_WAITS)
        if not hasattr(place, "revision"):  # a bucket
            return uri
        commit = HfApi().repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
    prefix = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{prefix}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")


def is_folder(uri: str) -> bool:
    """Whether a URI names a folder; of a web server's, it ends in a slash."""
    return shown(uri).endswith("/") if _is_web(uri) else bool(_info(uri)["type"] == "directory")


def walk(uri: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Like `os.walk`: each folder, the folders in it, which the caller may shorten, and its files.

    fsspec's own leaves out folders that can't be read, and does not end if a folder lists itself as one in it.
    """
    todo = [uri]
    for _ in range(_MOST_FOLDERS):
        if not todo:
            return
        place = todo.pop()
        listing = _listing(place)
        system = _file_system(place)
        own = system.unstrip_protocol(place).rstrip("/")
        paths = {system.unstrip_protocol(one["name"]).rstrip("/"): one["type"] == "directory" for one in listing}
        below = {path.rpartition("/")[2]: path for path, is_folder in paths.items() if is_folder and path != own}
        folders = [*below]
        yield own, folders, [path.rpartition("/")[2] for path, is_folder in paths.items() if not is_folder]
        todo += [below[name] for name in reversed(folders)]
    raise UserError(f"{shown(uri)} has more than {_MOST_FOLDERS:,} folders; name its files")


def matches(uri: str) -> list[str]:
    """The files that match a pattern."""
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    system = _file_system(uri)
    if not system.async_impl or ("**" in uri and not _is_web(uri)):  # whole trees in few requests
        listing = _find(uri, lambda system: system.glob(uri, detail=True, **_bounds(system)))
        return sorted(system.unstrip_protocol(path) for path, info in listing.items() if info["type"] == "file")
    root = re.split(r"[*[]" if _is_web(uri) else r"[*?[]", uri)[0].rpartition("/")[0]
    parts, is_match, files = uri.split("/"), re.compile(glob_translate(uri)).match, []
    for folder, folders, names in walk(f"{root}/"):
        files += [path for name in names if is_match(path := f"{folder}/{name}")]
        level = folder.count("/") + 1
        if "**" not in uri:
            folders[:] = [name for name in folders if level + 1 < len(parts) and fnmatchcase(name, parts[level])]
    return sorted(files)


def identify(uri: str, refresh: bool = False) -> Identity:
    """Size and version of a file; `refresh` bypasses the listing of its folder."""
    if refresh:
        _file_system(uri).invalidate_cache()
    info = _info(uri)
    checksum = (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("md5Hash")
    stated = (info.get(key) for key in ("ETag", "etag", "Content-MD5", "Digest", "Last-Modified"))
    return Identity(info["size"] or 0, checksum or next(filter(None, stated), None))


def first_bytes(uri: str, count: int) -> bytes:
    """Read the first bytes of a file."""

    def read(system: Any) -> bytes:
        with system.open(uri, "rb", cache_type="none") as file:
            return bytes(file.read(count))

    return bytes(_find(uri, read))


def has_ranges(uri: str, size: int) -> bool:
    """Whether the server of a file sends parts of it; some web servers send files only whole."""

    def read_last(system: Any) -> bool:
        try:
            with system.open(uri, "rb", cache_type="none") as file:
                file.seek(size - 1)
                return len(file.read(1)) == 1
        except ValueError:
            return False

    return not _is_web(uri) or bool(_find(uri, read_last))


def open_remote(uri: str) -> BinaryIO:
    """Open a file whose server sends parts of it, to sample it."""
    with explained(uri):
        return io.BufferedReader(_file_system(uri).open(uri, "rb", cache_type="none"), _BUFFER_BYTES)


def download(files: Mapping[str, Identity]) -> dict[str, str]:
    """Download files, several at once, unless there is a copy of the same version; return the copies by URI.

    They are in the folder `moelpr` of Hugging Face's cache (HF_HOME). Interrupted, the next call goes on by file.

    Raises:
        UserError: A file has changed since it was identified.
        MachineError: A file can't be read, although it was tried again and again.
    """
    copies = {uri: _copy_path(uri, identity) for uri, identity in files.items()}
    if missing := [uri for uri, path in copies.items() if not path.is_file() or files[uri].version is None]:
        total = sum(files[uri].bytes for uri in missing)
        print(f"note: downloading {len(missing):,} files ({total / 1e9:,.3f} GB)", file=sys.stderr)
        with ThreadPool(min(len(missing), _DOWNLOADS_AT_ONCE)) as pool:  # Ctrl-C waits for no daemon
            done = pool.imap_unordered(lambda uri: _download(uri, files[uri], copies[uri]), missing)
            for number, uri in enumerate(done, 1):
                print(f"downloaded {number:,} of {len(missing):,} files: {shown(uri)}", file=sys.stderr)
            pool.close()
            pool.join()  # no thread is left when this process forks
    return {uri: str(path) for uri, path in copies.items()}


def _copy_path(uri: str, identity: Identity) -> Path:
    """The place of a file's copy; a later commit of the Hub may have the same file."""
    from huggingface_hub import constants

    name = re.sub("@[0-9a-f]{40}/", "/", shown(uri))
    key = hashlib.sha256(f"{name} {identity.bytes} {identity.version}".encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "moelpr" / f"{key}-{PurePosixPath(name).name}"


def _download(uri: str, identity: Identity, path: Path) -> str:
    with explained(uri, MachineError), atomic_file(path) as temporary:
        _persistently(uri, lambda system: system.get_file(uri, str(temporary)))
        is_same = identity == identify(uri, refresh=True) and identity.bytes in (0, temporary.stat().st_size)
        if is_same and re.fullmatch("[0-9a-f]{64}", identity.version or ""):
            with open(temporary, "rb") as file:
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == identity.version
        if not is_same:
            raise UserError(f"{shown(uri)} has changed while it was downloaded; run the command again")
    return uri


def close_connections() -> None:
    """Close all connections, before this process forks: parent and child would share what waits for answers."""
    for kind in _used:
        kind.clear_instance_cache()
    if _used:
        gc.collect()  # closes those of a file system that is not used any more
    _used.clear()


def _file_system(uri: str) -> Any:
    """The file system of a URI, for this process and thread: fsspec keeps it."""
    scheme = _scheme(uri)
    try:
        import fsspec  # type: ignore[import-untyped]

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs the errors that it raises, with tracebacks.
        # With ~/.netrc and proxies.
        options = {"client_kwargs": {"trust_env": True, "trace_configs": [_checks()]}} if _is_web(uri) else {}
        if scheme == "s3":
            options = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 1}}}
        system = fsspec.filesystem(scheme, **options)
        if scheme == "s3":
            system.retries = 1  # the attempts of this module follow, and would multiply
        _used.add(type(system))
        return system
    except ImportError as error:
        raise UserError(
            f"{shown(uri)} needs packages that are not installed here; run {install_command('remote')}"
        ) from error


@cache
def _checks() -> Any:
    """Hooks that refuse parts that were not asked for, and redirects into this machine or its network."""
    import aiohttp

    async def check_part(_: Any, __: Any, params: Any) -> None:
        asked, sent = params.headers.get("Range", ""), params.response.headers.get("Content-Range", "")
        if sent and asked and re.findall(r"\d+", asked)[:1] != re.findall(r"\d+", sent)[:1]:
            raise UserError(f"the server of {shown(str(params.url))} sends another part of it ({sent}, not {asked})")

    async def check_redirect(_: Any, __: Any, params: Any) -> None:
        source = params.url.host
        target = urlsplit(urljoin(str(params.url), params.response.headers.get("Location", ""))).hostname or source
        with suppress(socket.gaierror):  # a proxy may know it
            found = {ipaddress.ip_address(one[4][0]) for one in socket.getaddrinfo(target, None)}
            if target != source and not all(address.is_global for address in found):
                raise UserError(f"{shown(str(params.url))} leads to {target}, which is no public address; pass another")

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(check_redirect)
    config.on_request_end.append(check_part)
    return config


def _find(uri: str, call: Callable[[Any], Any]) -> Any:
    with explained(uri):
        return _persistently(uri, call, _FIRST_WAITS)


def _info(uri: str) -> Any:
    return _find(uri, lambda system: system.info(uri, **_bounds(system)))


def _bounds(system: Any) -> dict[str, float]:
    """The limit of a listing's time: pages of object storage may follow each other for ever."""
    return {"timeout": _LISTING_S} if system.async_impl else {}


def _listing(uri: str) -> Any:
    return _find(uri, lambda system: system.ls(uri, detail=True, **_bounds(system)))


@contextmanager
def explained(uri: str, kind: type[UserError | MachineError] = UserError) -> Iterator[None]:
    """Turn any error about a URI into one sentence, without addresses, which may be signed."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | MachineError) or _is_disk_full(error):
            raise
        first: Any = error
        while cause := first.__cause__ or first.__context__:
            first = cause
            if isinstance(first, UserError):
                raise first from None
        if isinstance(first, FileNotFoundError):
            reason = "not found"
        elif hasattr(first, "request_info"):  # aiohttp's, which has no status if redirects do not end
            reason = f"{first.status or 'too many redirects'} {first.message}".strip()
        else:
            reason = re.sub(r"\w+://[^\s'\"]+", "its address", re.sub(" for url '.*'", "", first_line(first)))
        login = _SCHEMES[_scheme(uri)]
        if _scheme(uri) == "hf" and not uri.startswith(("hf://datasets/", "hf://buckets/")):
            reason += "; the address of a data set starts with hf://datasets/"
        raise (MachineError if _is_outage(error) or _is_outage(first) else kind)(
            f"{shown(uri)} can't be read ({reason}); correct the address, check the network, or log in: {login}"
        ) from None


def _persistently[T](uri: str, call: Callable[[Any], T], attempts: int | None = None) -> T:
    """Call a function of a URI's file system, again after waits if it fails for a reason that may pass."""
    for wait in _WAITS_S[:attempts]:
        try:
            return call(_file_system(uri))
        except Exception as error:
            if type(error).__name__ == "FSTimeoutError":  # the limit of `_bounds`
                raise UserError(f"the listing of {shown(uri)} has no end; name its files") from None
            if _is_final(error):
                raise
            if wait >= _SAID_AFTER_S:
                print(f"note: {shown(uri)} can't be read yet; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    return call(_file_system(uri))


def _is_final(error: BaseException) -> bool:
    """Whether another attempt cannot help: the file is missing or forbidden, or the disk is full."""
    if isinstance(error, UserError | FileNotFoundError | PermissionError) or _is_disk_full(error):
        return True
    return _status(error) in (401, 403, 404, 410) or type(error).__name__.endswith("CredentialsError")


def _is_outage(error: BaseException) -> bool:
    """Whether a server does not answer, or says that it can't now: nothing is wrong with the address."""
    if (status := _status(error)) is not None:
        return status == 429 or status >= 500
    return isinstance(error, TimeoutError | ConnectionError) or type(error).__name__ == "EndpointConnectionError"


def _status(error: BaseException) -> int | None:
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL
