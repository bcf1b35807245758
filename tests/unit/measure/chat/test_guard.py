"""The page's server answers its own page, and no other."""

import asyncio
import json
from typing import Any

import pytest

from moelpr.measure.chat.guard import Guard

OWN = "127.0.0.1:7860"
PROMPT: dict[str, Any] = {"data": ["Hi", None, 128, 0.5], "fn_index": 0, "trigger_id": 4, "session_hash": "ab12"}
NEW_CHAT: dict[str, Any] = {"data": [], "fn_index": 2, "trigger_id": 6, "session_hash": "ab12"}


def ask(
    path: str = "/config", method: str = "GET", kind: str = "http", body: bytes = b"", **headers: str
) -> tuple[list[Any], list[Any]]:
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
    scope = {"type": kind, "method": method, "path": path, "headers": raw}
    asyncio.run(Guard(application, "127.0.0.1", 7860)(scope, receive, send))
    return received, sent


def send_event(event: object) -> tuple[list[Any], list[Any]]:
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return ask("/gradio_api/queue/join", "POST", body=body, origin=f"http://{OWN}")


@pytest.mark.parametrize(
    "headers", [{}, {"host": "localhost:7860"}, {"origin": f"http://{OWN}"}, {"origin": "http://localhost:7860"}]
)
@pytest.mark.parametrize("path", ["/", "/assets/a.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/ab12"])
def test_the_page_is_answered(path: str, headers: dict[str, str]) -> None:
    received, sent = ask(path, **headers)
    assert received and not sent


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:7860.evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_others_are_refused(headers: dict[str, str], kind: str) -> None:
    received, sent = ask(kind=kind, **headers)
    assert not received and (sent[0].get("status") == 403 or sent[0].get("code") == 1008)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    "upload upload_progress /upload/ run/ask api/ask call/ask call/v2/ask component_server deep_link cancel".split(),
)
def test_what_the_page_does_not_ask_is_refused(path: str, method: str) -> None:
    received, sent = ask(f"/gradio_api/{path}", method, origin=f"http://{OWN}")
    assert not received and sent[0]["status"] == 403


def test_an_error_about_a_request_is_no_traceback_of_the_server() -> None:
    async def application(*_: Any) -> None:
        raise OSError

    async def receive() -> dict[str, Any]:
        return {}

    scope = {"type": "http", "method": "GET", "path": "/assets/a", "headers": [(b"host", OWN.encode())]}
    asyncio.run(Guard(application, "127.0.0.1", 7860)(scope, receive, receive))


@pytest.mark.parametrize("event", [PROMPT, PROMPT | {"fn_index": 1}, NEW_CHAT], ids=str)
def test_events_of_the_page_arrive_as_they_were_sent(event: dict[str, Any]) -> None:
    ((message,), sent) = send_event(event)
    assert json.loads(message["body"]) == event and not message.get("more_body") and not sent


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"[" * 100_000,
        b"x" * (2 << 20),
        json.dumps(PROMPT).encode() + b" " * (1 << 20),
        [],
        PROMPT | {"data": []},
        PROMPT | {"fn_index": 3},
        PROMPT | {"fn_index": 2},
        PROMPT | {"data": [None, None, 128, 0]},
        PROMPT | {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None, 128, 0]},
        PROMPT | {"data": ["\ud800", None, 128, 0]},
        PROMPT | {"data": ["Hi", [], 128, 0]},
        PROMPT | {"data": ["Hi", None, 1e9, 0]},
        PROMPT | {"data": ["Hi", None, 128, float("nan")]},
        PROMPT | {"data": ["Hi", None, "8", 0]},
        PROMPT | {"session_hash": "a" * 100},
        PROMPT | {"batched": True},
    ],
    ids=lambda event: str(event)[:60],
)
def test_an_event_that_the_page_cannot_have_sent_is_refused(event: object) -> None:
    received, sent = send_event(event)
    assert not received and sent[0]["status"] == 403
