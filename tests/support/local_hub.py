"""A server that answers as the Hugging Face Hub does when a model is downloaded, or uploaded without Xet."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_" + "a" * 34


class LocalHub(ThreadingHTTPServer):
    """Repositories by name; those of the user "me" may be written to, with `TOKEN`.

    Attributes:
        repositories: Name → files.
        private: Names of the private repositories.
        gated: Names of the repositories that nobody may read.
        revisions: Names of branches and tags, which all repositories have; each stands for the last commit.
        blobs: Large files that were received, also before a commit.
        received: The checksum of each large file as often as it was received.
        broken: Whether large files of more than 10,000 bytes are refused.
        asked: Every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.revisions = {"main"}
        self.blobs: dict[str, bytes] = {}
        self.received: list[str] = []
        self.asked: list[str] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> set[str]:
        """The files that were downloaded, by name."""
        return {line.split("/", 5)[5] for line in self.asked if line.startswith("GET ") and "/resolve/" in line}

    def commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this process ask it, and keep what it downloads in a folder."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        hub = self.server
        path = self.path.split("?")[0].strip("/")
        hub.asked.append(f"{self.command} /{path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts, login = path.split("/"), self.headers.get("Authorization")
        is_download = not login and ("resolve" in parts or "tree" in parts or "revision" in parts)
        if not path.startswith("lfs/") and login != f"Bearer {TOKEN}" and not is_download:
            return self._answer(401, {"error": "Invalid username or password."})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        always = {"whoami-v2": {"type": "user", "name": "me"}, "validate-yaml": {"errors": [], "warnings": []}}
        if path.removeprefix("api/") in always:
            return self._answer(200, always[path.removeprefix("api/")])
        if path == "api/repos/create":
            actual = json.loads(body)
            name = f"me/{actual['name']}" if "/" not in actual["name"] else actual["name"]
            if actual.get("organization", "me") != "me" or not name.startswith("me/"):
                return self._answer(403, {"error": "You don't have the rights to create a model"})
            is_new = name not in hub.repositories
            hub.repositories.setdefault(name, {})
            if is_new and (actual.get("private") or actual.get("visibility") == "private"):
                hub.private.add(name)
            return self._answer(200 if is_new else 409, {"url": f"{hub.url}/{name}"})
        if path.startswith("lfs/"):
            return self._receive(parts[1], body)
        if name in hub.gated:
            return self._answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        if name not in hub.repositories:
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = hub.repositories[name]
        commit = hub.commit(name)
        if "revision" in parts and unquote(parts[5]) not in {*hub.revisions, commit}:
            return self._answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if "resolve" in parts:
            if (content := files.get("/".join(parts[4:]))) is None:
                return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return self._answer(200, content, ETag=hashlib.sha1(content).hexdigest(), X_Repo_Commit=commit)
        if "tree" in parts:
            return self._answer(
                200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
            )
        if "preupload" in parts:
            asked = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".gguf", "tokenizer.json")
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith(large) else "regular"} for p in asked]
            return self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if path.endswith("objects/batch"):
            return self._answer(
                200, {"transfer": "basic", "objects": [*map(self._action, json.loads(body)["objects"])]}
            )
        if "commit" in parts:
            return self._commit(name, files, [json.loads(line) for line in body.splitlines()])
        if len(parts) == 4 or "revision" in parts:
            return self._answer(200, {"id": name, "sha": commit, "siblings": [{"rfilename": p} for p in files]})
        self._answer(404, {"error": f"not in this Hub: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _receive(self, oid: str, body: bytes) -> None:
        if self.server.broken and len(body) > 10_000:
            return self._answer(400, {"error": "the connection was cut"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.received.append(oid)
        self.server.blobs[oid] = body
        self._answer(200, b"")

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.blobs:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, name: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = "b" * 40
        self._answer(200, {"success": True, "commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})
