"""A web server, an S3 and a Hugging Face Hub that serve one folder, and fail on request.

The folder is `http://HOST/files/`, the bucket `s3://bucket/` (AWS_ENDPOINT_URL) and the data set
`hf://datasets/owner/name` (HF_ENDPOINT), whose commit is in the file `.commit`; revision `gone` does not exist, and the
data set `owner/gated` needs a login. Whoever reads may not share a process with it: a forked one would keep its
connections open.
"""

import hashlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "/api/datasets/owner/name"


@dataclass
class TextServer:
    """A running server."""

    address: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make the libraries ask it."""
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": self.address, "HF_ENDPOINT": self.address, "HF_TOKEN": "hf_hidden-token"}

    def uri(self, way: str, path: str) -> str:
        """The URI of a file or folder, by "http", "s3" or "hf"."""
        places = {"http": f"{self.address}/files", "s3": "s3://bucket", "hf": "hf://datasets/owner/name"}
        return f"{places[way]}/{path}"

    def fail(self, kind: str, times: int = 1) -> None:
        """Let the next downloads of whole files fail, with a status or "cut" in the midst; "whole": know no ranges."""
        body = json.dumps({"kind": kind, "times": times}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.address}/_fail", body)).close()

    def requests(self) -> list[str]:
        """The requests since the last call: method, path and range."""
        with urllib.request.urlopen(f"{self.address}/_log") as answer:
            actual: list[str] = json.load(answer)
            return actual


@contextmanager
def text_server(folder: Path) -> Iterator[TextServer]:
    """Serve a folder."""
    command = [sys.executable, "-m", "tests.support.text_server", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield TextServer(process.stdout.readline().strip(), folder)
        finally:
            process.kill()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    faults: dict[str, Any] = {"times": 0}
    log: list[str] = []
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        type(self).faults = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, b"")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if path == "/_log":
            actual = json.dumps(self.log).encode()
            self.log.clear()
            return self._answer(200, actual)
        self.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if "gated" in path:
            return self._answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        if "@gone" in path or path.startswith(f"{REPOSITORY}/revision/gone"):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/files/"):
            return self._file(path.removeprefix("/files/"))
        if path.rstrip("/") == "/bucket":
            return self._list_bucket(query)
        if path.startswith("/bucket/"):
            return self._file(path.removeprefix("/bucket/"))
        if path.startswith("/datasets/owner/name/resolve/"):
            return self._file(path.split("/", 6)[6])
        if path.startswith(f"{REPOSITORY}/tree/"):
            return self._tree(path.removeprefix(f"{REPOSITORY}/tree/").partition("/")[2], "recursive" in self.path)
        if path == REPOSITORY or path.startswith(f"{REPOSITORY}/revision/"):
            return self._json({"id": "owner/name", "sha": self._commit(), "siblings": [], "private": False})
        self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"} if "/api/" in path else {})

    do_HEAD = do_GET

    def _commit(self) -> str:
        file = self.folder / ".commit"
        return file.read_text() if file.exists() else COMMIT

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _tree(self, path: str, recursive: bool) -> None:
        top = self.folder / path
        if not top.is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        actual = []
        for item in sorted(top.rglob("*") if recursive else top.iterdir()):
            name, size = str(item.relative_to(self.folder)), item.stat().st_size
            entry = {"path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
            if item.is_dir():
                actual.append(entry | {"type": "directory", "size": 0})
            else:
                lfs = {"oid": hashlib.sha256(item.read_bytes()).hexdigest(), "size": size, "pointerSize": 130}
                actual.append(entry | {"type": "file", "size": size, "lfs": lfs})
        self._json(actual)

    def _list_bucket(self, query: dict[str, str]) -> None:
        prefix, folders, files = query.get("prefix", ""), set(), []
        for item in sorted(item for item in self.folder.rglob("*") if item.is_file()):
            name = str(item.relative_to(self.folder))
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                if "delimiter" in query and "/" in rest:
                    folders.add(prefix + rest.split("/")[0] + "/")
                else:
                    state = f"<Size>{item.stat().st_size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    etag = escape(_etag(item))
                    files.append(f"<Contents><Key>{escape(name)}</Key>{state}<ETag>{etag}</ETag></Contents>")
        files += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        body = f"<Name>bucket</Name><KeyCount>{len(files)}</KeyCount>{''.join(files)}"
        content = f"<ListBucketResult>{body}</ListBucketResult>".encode()
        self._answer(200, content, {"Content-Type": "application/xml"})

    def _file(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir() and self.path.startswith("/files/"):
            names = "".join(f'<a href="{item.name}{"/" * item.is_dir()}">x</a>' for item in sorted(path.iterdir()))
            return self._answer(200, names.encode(), {"Content-Type": "text/html"})
        if not path.is_file():
            return self._answer(404, b"")
        etag, size = _etag(path), path.stat().st_size
        if self.headers.get("If-Match", etag) != etag:
            return self._answer(412, b"")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), min(int(last) + 1 if last else size, size)
        fault = self.faults["kind"] if self.faults["times"] > 0 else ""
        if fault == "whole":
            return self._answer(200, path.read_bytes(), {"ETag": etag})
        if self.command == "GET" and fault and "Range" not in self.headers:
            self.faults["times"] -= 1
        else:
            fault = ""
        if fault.isdigit():
            return self._answer(int(fault), b"", {"Retry-After": "1"} if fault == "503" else {})
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with open(path, "rb") as file:
            file.seek(start)
            content = b"" if self.command == "HEAD" else file.read(stop - start)
        self._answer(206 if "Range" in self.headers else 200, content, headers, stop - start, fault == "cut")

    def _answer(self, status: int, body: bytes, headers: Any = (), length: int = 0, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in [*dict(headers).items(), ("Content-Length", str(length or len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a client may read only the start
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.wfile.flush()
        if cut:
            self.close_connection = True


def _etag(path: Path) -> str:
    state = path.stat()
    return _etag_of(path, state.st_mtime_ns, state.st_size)


@lru_cache
def _etag_of(path: Path, *state: int) -> str:
    with open(path, "rb") as file:
        return f'"{hashlib.file_digest(file, "md5").hexdigest()}"'


def main() -> None:
    _Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
