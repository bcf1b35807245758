"""The page's server answers its own page, and no other."""

import asyncio
from typing import Any

import pytest

from moelpr.measure.chat.guard import Guard

OWN = "127.0.0.1:7860"


def ask(path: str = "/config", kind: str = "http", body: bytes = b"", **headers: str) -> tuple[list[Any], list[Any]]:
    """The messages that the application behind the guard has received, and those that were sent."""
    received: list[Any] = []
    sent: list[Any] = []
    parts = [body[start : start + 4096] for start in range(0, len(body), 4096)] or [b""]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        received.append(await receive())
        while received[-1].get("more_body"):
            received.append(await receive())

    async def receive() -> dict[str, Any]:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in ({"host": OWN} | headers).items()]
    scope = {"type": kind, "path": path, "headers": raw}
    asyncio.run(Guard(application, "127.0.0.1", 7860)(scope, receive, send))
    return received, sent


@pytest.mark.parametrize(
    "headers", [{}, {"host": "localhost:7860"}, {"origin": f"http://{OWN}"}, {"origin": "http://localhost:7860"}]
)
def test_the_page_is_answered(headers: dict[str, str]) -> None:
    received, sent = ask(body=b"x" * 9000, **headers)
    assert sum(len(part["body"]) for part in received) == 9000 and not sent


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:7860.evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
        {"content_length": str(60 << 20)},
        {"content_length": "-1"},
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_others_are_refused(headers: dict[str, str], kind: str) -> None:
    received, sent = ask(kind=kind, **headers)
    assert not received and (sent[0].get("status") == 403 or sent[0].get("code") == 1008)


@pytest.mark.parametrize("path", ["gradio_api/upload", "upload", "gradio_api/upload_progress", "gradio_api//upload/"])
def test_nothing_can_be_uploaded(path: str) -> None:
    received, sent = ask(path=f"/{path}", origin=f"http://{OWN}")
    assert not received and sent[0]["status"] == 403


def test_a_request_without_a_length_is_bounded() -> None:
    received, _ = ask(body=b"x" * (2 << 20))
    assert received[-1] == {"type": "http.disconnect"} and sum(len(p.get("body", b"")) for p in received) <= 1 << 20
