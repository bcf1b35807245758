"""Lets only the page itself talk to its server: no other site that is open in the browser, and no large request."""

from typing import Any

_MOST_BYTES = 1 << 20  # a request: the longest prompt, and its conversation's number


class Guard:
    """Middleware that refuses other hosts (DNS rebinding), other sites' requests, uploads, and more than a megabyte."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._app, self._hosts = app, {f"{name}:{port}" for name in (host, "localhost")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length = 0

        async def bounded() -> Any:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            return {"type": "http.disconnect"} if length > _MOST_BYTES else message

        if scope["type"] == "lifespan" or self._is_own(scope["path"], dict(scope["headers"])):
            await self._app(scope, bounded, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only the page itself may ask this"})

    def _is_own(self, path: str, headers: dict[bytes, bytes]) -> bool:
        host, origin, length = (
            headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin", b"content-length")
        )
        is_own = host in self._hosts and (b"origin" not in headers or origin.removeprefix("http://") in self._hosts)
        is_short = not length or (length.isdecimal() and int(length) <= _MOST_BYTES)
        return is_own and is_short and "upload" not in path
