"""A page in a headless Chromium: what it drew, whom it asked, and what it complained about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WAIT = 240_000  # milliseconds; a busy machine is slow
# Each chart as a reader sees it, and whether the page is wider than the screen.
_LOOK = """() => {
  const charts = [...document.querySelectorAll("svg[role=img]")].map(svg => {
    const frame = svg.getBoundingClientRect();
    const shapes = [...svg.querySelectorAll("path, rect, line, circle, use, text")].filter(s => !s.closest("defs"));
    const isEmpty = shape => { const b = shape.getBBox(); return !(b.width > 0 || b.height > 0); };
    const isCutOff = text => {
      const b = text.getBoundingClientRect(), { left, top, right, bottom } = frame;
      return b.left < left - 2 || b.top < top - 2 || b.right > right + 2 || b.bottom > bottom + 2;
    };
    return {
      title: svg.querySelector("title").textContent, width: frame.width, height: frame.height, shapes: shapes.length,
      empty: shapes.filter(isEmpty).length,
      cut_off: [...svg.querySelectorAll("text")].filter(isCutOff).map(text => text.textContent),
    };
  });
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  const page = document.documentElement, style = getComputedStyle(document.body);
  const boxes = [...document.querySelectorAll(".scroll")];
  return {
    charts, scrolled: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).length,
    repeated_ids: ids.length - new Set(ids).size, width: innerWidth, page_width: page.scrollWidth,
    ink: style.color, paper: style.backgroundColor,
  };
}"""


@contextmanager
def opened(address: str, width: int, is_dark: bool = False) -> Iterator[tuple[Any, set[str], list[str]]]:
    """The page, the hosts that it has asked, and what it has complained about."""
    from playwright.sync_api import sync_playwright

    hosts: set[str] = set()
    complaints: list[str] = []
    with sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if is_dark else "light")
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        for _ in range(100):  # an address may be printed a little before the page is there
            try:
                page.goto(address)
                break
            except Exception:
                page.wait_for_timeout(300)
        yield page, hosts - {""}, complaints
        browser.close()


def look(page: Path, width: int, is_dark: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """Find on the page what _LOOK looks for, and its `complaints`."""
    with opened(page.resolve().as_uri(), width, is_dark) as (shown, _, complaints):
        if picture:
            shown.screenshot(path=picture, full_page=True)
        return shown.evaluate(_LOOK) | {"complaints": complaints}
