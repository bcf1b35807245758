"""Files on the Hugging Face Hub, in object storage and on web servers, by fsspec: what a URI means, and its bytes.

Credentials come from where the libraries look for them. Neither they nor a signed URL's query are in what is shown.
"""

import gc
import io
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from moelpr.base.errors import MachineError, UserError, first_line
from moelpr.base.versions import install_command

# Where to log in, by a URI's scheme.
_LOGIN = {
    "hf": "accept the data set's terms on the Hub if it has some, and run hf auth login or set HF_TOKEN",
    "s3": "renew the credentials that AWS_PROFILE or ~/.aws names, or set FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run gcloud auth application-default login",
    "https": "renew the URL if it is signed, or put user and password into ~/.netrc",
}
_LOGIN["http"] = _LOGIN["https"]
# Waits between attempts to read a range; of finding a file, which may be a typo, only the first.
_WAITS_S: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 32, 60)
_FIRST_WAITS = 3
_LONGEST_WAIT_S = 600.0
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_NETWORK_MODULES = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "httpcore2", "httpx2", "huggingface_hub")
# Ranges grow from the first to the second while a file is read in its order.
_FIRST_RANGE, _LARGEST_RANGE = 1 << 20, 1 << 23

_used: set[Any] = set()  # types of file systems


class Identity(NamedTuple):
    """What a remote file is: its size, and the checksum or ETag that its server states, if any."""

    bytes: int
    version: str | None


def is_remote(name: str) -> bool:
    """Whether a name is a URI."""
    return name.partition("://")[0] in _LOGIN and "://" in name


def shown(uri: str) -> str:
    """The part of a URI that may be shown and recorded: without a query, which may be a signature."""
    return re.sub(r"[?#].*", "", uri, flags=re.DOTALL) if uri.startswith("http") else uri


def pinned(uri: str) -> str:
    """A URI whose content stays the same if the file system has revisions: the Hub's, with that of a commit.

    Raises:
        UserError: It contains a password, or the data set or its revision can't be read.
    """
    scheme, _, rest = uri.partition("://")
    login, _, host = rest.split("/")[0].rpartition("@")
    if login and scheme.startswith("http"):
        raise UserError(f"the URL at {host} contains a login; {_LOGIN[scheme]}")
    if scheme != "hf":
        return uri
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RevisionNotFoundError

    with _explained(uri):
        try:
            place = _persistently(lambda: _file_system(uri).resolve_path(rest), _WAITS_S[:_FIRST_WAITS])
            if not hasattr(place, "revision"):  # a bucket
                return uri
            commit = HfApi().repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
        except FileNotFoundError as error:
            if not any(isinstance(cause, RevisionNotFoundError) for cause in _causes(error)):
                raise
            raise UserError(f"the revision of {uri} does not exist, or no longer; name another after @") from None
    prefix = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{prefix}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")


def is_folder(uri: str) -> bool:
    """Whether a URI names a folder; of a web server's, it ends in a slash."""
    if uri.startswith("http"):
        return shown(uri).endswith("/")
    return bool(_find(uri, lambda system: system.info(uri))["type"] == "directory")


def walk(uri: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Like `os.walk`: each folder, the folders in it, which the caller may shorten, and its files."""
    system = _file_system(uri)
    with _explained(uri):
        for path, folders, names in system.walk(uri, on_error="raise"):
            yield system.unstrip_protocol(path).rstrip("/"), folders, names


def matches(uri: str) -> list[str]:
    """The files that match a pattern."""
    found = _find(uri, lambda system: system.glob(uri, detail=True))
    name = _file_system(uri).unstrip_protocol
    return sorted(name(path) for path, info in found.items() if info["type"] == "file")


def identify(uri: str, refresh: bool = False) -> Identity:
    """What a file is; `refresh`: now, not when its folder was listed."""
    if refresh:
        _file_system(uri).invalidate_cache()
    return _identity(uri, _find(uri, lambda system: system.info(uri)))


def _identity(uri: str, info: dict[str, Any]) -> Identity:
    if info["size"] is None or info.get("partial") is False:
        raise _no_ranges(uri)
    checksum = (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("md5Hash")
    stated = (info.get(key) for key in ("ETag", "etag", "Content-MD5", "Digest", "Last-Modified"))
    return Identity(info["size"], checksum or next(filter(None, stated), None))


class RemoteFile(io.RawIOBase):
    """The bytes of a file, read by ranges.

    Attempts that may succeed later are repeated. While one range is used, the next is fetched, if it is read in order.

    Args:
        identity: What the file was when it was found; it must not change.
        in_order: It is read from some place on, in order; otherwise only what is asked for is fetched.
    """

    def __init__(self, uri: str, identity: Identity, in_order: bool = True) -> None:
        self._uri, self._identity, self._in_order = uri, identity, in_order
        self._position, self._start, self._piece = 0, 0, b""
        self._next: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1) if in_order else None
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._identity.bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._identity.bytes:
            return 0
        if not self._start <= self._position < self._start + len(self._piece):
            self._load(len(buffer))
        offset = self._position - self._start
        content = self._piece[offset : offset + len(buffer)]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        super().close()

    def _load(self, wanted: int) -> None:
        if self._thread is None:
            self._start, self._piece = self._position, self._fetch(self._position, wanted)
            return
        follows = self._piece and self._position == self._start + len(self._piece)
        size = min(2 * len(self._piece), _LARGEST_RANGE) if follows else _FIRST_RANGE
        if self._next is not None and self._next[0] == self._position:
            self._piece = self._next[1].result()
        else:
            self._piece = self._thread.submit(self._fetch, self._position, size).result()
        self._start, end = self._position, self._position + len(self._piece)
        goes_on = follows and end < self._identity.bytes  # not after the first range, which may be all that is wanted
        self._next = (end, self._thread.submit(self._fetch, end, size)) if goes_on else None

    def _fetch(self, start: int, size: int) -> bytes:
        """Read a range; raise a `MachineError` if that fails again and again."""
        stop = min(start + size, self._identity.bytes)

        def read() -> bytes:
            self._file = self._file or self._opened()
            self._file.seek(start)
            piece: bytes = self._file.read(stop - start)
            if len(piece) != stop - start:
                raise EOFError("the connection ended early")
            return piece

        try:
            return _persistently(read, _WAITS_S)
        except Exception as error:
            if "range requests" in str(error):
                raise _no_ranges(self._uri) from None
            if isinstance(error, UserError) or not _is_of_network(error):
                raise
            if _has_changed(error):
                raise changed(self._uri) from None
            raise MachineError(f"{_refusal(self._uri, error)}, and run it again with --resume") from None

    def _opened(self) -> Any:
        size, version = self._identity
        options: dict[str, Any] = {}
        if self._uri.startswith("http"):
            options["size"] = size
            if version and version.startswith('"'):
                options["headers"] = {"If-Match": version}
        file = _file_system(self._uri).open(self._uri, "rb", cache_type="none", **options)
        if not options and _identity(self._uri, file.details) != self._identity:
            raise changed(self._uri)
        return file


def close_connections() -> None:
    """Close all connections, before this process forks: parent and child would share what waits for answers."""
    if not _used:
        return
    for kind in _used:
        kind.clear_instance_cache()
    _used.clear()
    _aws_session.cache_clear()
    gc.collect()  # closes those of a file system that is not used any more


def changed(uri: str) -> UserError:
    """The error for a file that is not what it was when the work began."""
    return UserError(
        f"{shown(uri)} has changed since it was first read, so the result would contain parts of two versions; start "
        "again without --resume"
    )


def _file_system(uri: str) -> Any:
    """The file system of a URI, for this process and thread: fsspec keeps it."""
    scheme = uri.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]

        options: dict[str, Any] = {}
        if scheme.startswith("http"):
            options = {"client_kwargs": {"trust_env": True}}  # ~/.netrc and proxies
        elif scheme == "s3":
            options = {"session": _aws_session()}
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs the errors that it raises, with tracebacks.
        system = fsspec.filesystem(scheme, **options)
        _used.add(type(system))
        return system
    except ImportError as error:
        raise UserError(
            f"{shown(uri)} needs packages that are not installed here; run {install_command('remote')}"
        ) from error


@cache
def _aws_session() -> Any:
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    session.register_component("data_loader", _aws_descriptions())
    return session


@cache
def _aws_descriptions() -> Any:
    """What botocore knows of services, which takes longer to parse than a connection to make: forks have it too."""
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    return create_loader()


def _find(uri: str, call: Callable[[Any], Any]) -> Any:
    with _explained(uri):
        return _persistently(lambda: call(_file_system(uri)), _WAITS_S[:_FIRST_WAITS])


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn an error about a URI into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise UserError(_refusal(uri, error)) from None


def _persistently[T](call: Callable[[], T], waits: Iterable[float]) -> T:
    """Repeat a call that fails for a reason that may pass, after the waits, or when the server says (Retry-After)."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if not _is_of_network(error) or _has_changed(error) or not (status is None or status in _TEMPORARY):
                raise
            time.sleep(min(_retry_after(error) or wait, _LONGEST_WAIT_S))
    return call()


def _refusal(uri: str, error: BaseException) -> str:
    status = _status(error)
    if status in (401, 403):
        login = _LOGIN[uri.partition("://")[0]]
        return f"{shown(uri)} does not exist, or needs another login than yours ({status}); {login}"
    if status in (404, 410):
        return f"there is no {shown(uri)}; correct the address"
    return f"{shown(uri)} can't be read ({_reason(error)}); check the address and the network"


def _no_ranges(uri: str) -> UserError:
    return UserError(f"the server of {shown(uri)} sends files only whole; download it, and pass the copy")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _name(error: BaseException) -> str:
    return type(error).__name__


def _has_changed(error: BaseException) -> bool:
    """Whether a file's ETag is another than the one asked for."""
    return _status(error) == 412 or "FileExpired" in map(_name, _causes(error))


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, OSError | EOFError) or type(error).__module__.split(".")[0] in _NETWORK_MODULES


def _status(error: BaseException) -> int | None:
    """The HTTP status that led to an error, as each of the libraries keeps it; None if there was no answer."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        found = getattr(cause, "status", None) or getattr(answer, "status_code", None)
        if _name(cause) == "HttpError":  # gcsfs'; other libraries have codes that are no status
            found = getattr(cause, "code", None)
        if isinstance(answer, dict):  # botocore's
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(str(found))
    if _name(error) in ("NoCredentialsError", "PartialCredentialsError", "PermissionError", "RefreshError"):
        return 403
    return 404 if isinstance(error, FileNotFoundError) and not error.__cause__ else None


def _retry_after(error: BaseException) -> float | None:
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        headers = getattr(cause, "headers", None) or getattr(answer, "headers", None) or {}
        if isinstance(answer, dict):
            headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        seconds = headers.get("Retry-After") or headers.get("retry-after")
        if seconds and str(seconds).isdigit():
            return float(seconds)
    return None


def _reason(error: BaseException) -> str:
    """Why something failed, without addresses, which may be signed."""
    status = _status(error)
    if status is not None:
        return f"HTTP status {status}"
    *_, first = _causes(error)
    return re.sub(r"\w+://\S+", "its address", first_line(first))
