"""Lets only the page itself talk to its server: no other site that is open in the browser, and no large request."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_MOST_BYTES = 1 << 20  # a request: the longest prompt, and its conversation's number
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class Guard:
    """Middleware that refuses other hosts (DNS rebinding), other sites' requests, uploads, and more than a megabyte."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], host: str, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in (host, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        length = 0

        async def bounded() -> Scope:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            return {"type": "http.disconnect"} if length > _MOST_BYTES else message

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._is_own(scope["path"], headers):
            return await self._app(scope, bounded, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"only the page itself may ask this"})

    def _is_own(self, path: str, headers: dict[bytes, str]) -> bool:
        origin, length = headers.get(b"origin"), headers.get(b"content-length", "0")
        return (
            headers.get(b"host") in self._hosts
            and (origin is None or origin.removeprefix("http://") in self._hosts)
            and "upload" not in path
            and length.isdecimal()
            and int(length) <= _MOST_BYTES
        )
