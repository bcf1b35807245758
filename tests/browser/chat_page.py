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

from tests.browser.browser import opened

WIDTH = 1240


@contextmanager
def served(export: Path, *flags: str) -> Iterator[str]:
    """Run the command; its page's address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    words = [sys.executable, "-m", "moelpr", "chat", str(export), "--port", port, *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), line
            yield line.split()[0]
        finally:
            process.terminate()


def ask(page: Any, prompt: str) -> None:
    """Type a prompt and wait until the answer is complete."""
    page.fill("#prompt textarea", prompt)
    page.click("#send")
    page.wait_for_selector("#maps .panel:nth-of-type(2) .token")
    written = ""
    while written != (written := page.inner_text("#maps")):
        page.wait_for_timeout(4000)


def take_picture(export: Path, base: Path, prompt: str, picture: Path) -> None:
    with served(export, "--base", str(base)) as address, opened(address, WIDTH) as (page, _, _):
        ask(page, prompt)
        page.locator("#maps .panel:nth-of-type(2) .token").nth(2).hover()
        page.wait_for_timeout(500)
        page.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
