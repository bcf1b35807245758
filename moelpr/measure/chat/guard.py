"""Lets only the page itself talk to its server: no other site that is open in the browser, and no other request."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moelpr.base.records import STRICT

MOST_TOKENS, MOST_TEMPERATURE = 1024, 1.5
_MOST_BYTES = 1 << 20  # a request: the longest prompt, and its conversation's number
# Files and folders that the page reads; all that it writes are events.
_FILES = "/ /config /theme.css /favicon.ico /manifest.json /gradio_api/startup-events /gradio_api/queue/data".split()
_FOLDERS, _EVENTS = ("/assets/", "/static/", "/gradio_api/heartbeat/"), "/gradio_api/queue/join"


@dataclass(frozen=True, config=STRICT)
class _Event[Number, Data]:
    session_hash: Annotated[str, Field(max_length=99)]
    trigger_id: int
    fn_index: Number  # in the order of the page's events
    data: Data  # a conversation is kept here, so the page sends none


_Tokens = Annotated[float, Field(ge=8, le=MOST_TOKENS)]
_Temperature = Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)]
_EVENT: TypeAdapter[Any] = TypeAdapter(
    _Event[Literal[0, 1], tuple[str, None, _Tokens, _Temperature]] | _Event[Literal[2], tuple[()]]
)


class Guard:
    """Middleware that refuses other hosts (DNS rebinding), other sites, and what Gradio would print a traceback for."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._app, self._hosts = app, {f"{name}:{port}" for name in (host, "localhost")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif self._is_own(scope) and (body := await _body(receive, scope["method"] == "POST")) is not None:
            messages = [{"type": "http.request", "body": body}]

            async def receive_again() -> Any:
                return messages.pop() if messages else await receive()

            with suppress(Exception):  # a session or file that is not there; Gradio prints the page's own errors itself
                await self._app(scope, receive_again, send)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only the page itself may ask this"})

    def _is_own(self, scope: Any) -> bool:
        path, headers = scope["path"], dict(scope["headers"])
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if host not in self._hosts or (b"origin" in headers and origin.removeprefix("http://") not in self._hosts):
            return False
        if scope["method"] == "POST":
            return bool(path == _EVENTS)
        return scope["method"] in ("GET", "HEAD") and (path in _FILES or path.startswith(_FOLDERS))


async def _body(receive: Any, is_event: bool) -> bytes | None:
    """The body of a request; None if it is too long, or no event of the page."""
    body, message = bytearray(), {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MOST_BYTES:
            return None
    try:
        if is_event:
            _EVENT.validate_json(body)
    except ValidationError:
        return None
    return bytes(body)
