"""The page of `moelpr chat` in a real browser, as a user meets it; run as a command, a picture of it.

.venv-browser/bin/python -m tests.browser.chat_page EXPORT BASE PROMPT docs/images/chat.png
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WIDTH, HEIGHT = 1240, 900
WAIT = 240_000  # milliseconds; a busy machine is slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(export: Path, *flags: str) -> Iterator[str]:
    """Run the command; its page's address."""
    words = [sys.executable, "-m", "moelpr", "chat", str(export), "--port", str(free_port()), *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), line
            yield line.split()[0]
        finally:
            process.terminate()


@contextmanager
def opened(address: str) -> Iterator[tuple[Any, set[str], list[str]]]:
    """The page, the hosts that it has asked, and what it has complained about."""
    from playwright.sync_api import sync_playwright

    hosts: set[str] = set()
    complaints: list[str] = []
    with sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        for _ in range(100):  # the address is printed a little before the page is there
            try:
                page.goto(address)
                break
            except Exception:
                page.wait_for_timeout(300)
        yield page, hosts - {""}, complaints
        browser.close()


def ask(page: Any, prompt: str) -> None:
    """Type a prompt and wait until the answer is complete."""
    page.fill("#prompt textarea", prompt)
    page.click("#send")
    page.wait_for_selector("#maps .panel:nth-of-type(2) .token")
    written = ""
    while written != (written := page.inner_text("#maps")):
        page.wait_for_timeout(4000)


def take_picture(export: Path, base: Path, prompt: str, picture: Path) -> None:
    with served(export, "--base", str(base)) as address, opened(address) as (page, _, _):
        ask(page, prompt)
        page.locator("#maps .panel:nth-of-type(2) .token").nth(2).hover()
        page.wait_for_timeout(500)
        page.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
