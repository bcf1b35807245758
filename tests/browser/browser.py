"""A page in a real browser without a window: what it drew, what it complained of, pictures of it."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

# What a page says is written into it, where --dump-dom shows it.
_TELL = """
<script>
const tell = found => {
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
};
</script>
"""

# Runs in the page: what a reader would see of each drawing, and whether the page is wider than the screen. It tells the
# page around it, since the browser writes out the outermost one alone.
_LOOK = """
<script>
addEventListener("load", () => {
  const charts = [...document.querySelectorAll("svg[role=img]")].map(svg => {
    const box = svg.getBoundingClientRect(), frame = svg.viewBox.baseVal;
    const shapes = [...svg.querySelectorAll("path, rect, line, circle, text")];
    const isEmpty = shape => { const b = shape.getBBox(); return !(b.width > 0 || b.height > 0); };
    const isCutOff = text => {
      const b = text.getBBox();
      return b.x < -2 || b.y < -2 || b.x + b.width > frame.width + 2 || b.y + b.height > frame.height + 2;
    };
    return {
      title: svg.querySelector("title").textContent, width: box.width, height: box.height, shapes: shapes.length,
      empty: shapes.filter(isEmpty).length,
      cut_off: [...svg.querySelectorAll("text")].filter(isCutOff).map(text => text.textContent),
    };
  });
  const page = document.documentElement, style = getComputedStyle(document.body);
  const boxes = [...document.querySelectorAll(".scroll")];
  parent.postMessage({
    charts, scrolled: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).length,
    width: innerWidth, page_width: page.scrollWidth, height: page.scrollHeight,
    ink: style.color, paper: style.backgroundColor,
  }, "*");
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """found: what _LOOK found; complaints: messages on the console."""

    found: dict[str, Any]
    complaints: list[str]


def missing_programs() -> list[str]:
    return [name for name in ("chromium", "pdftoppm") if shutil.which(name) is None]


def look(page: Path, folder: Path, width: int, is_dark: bool = False) -> Seen:
    """Open the page `width` pixels wide. folder: for files on the way."""
    watched = folder / "watched.html"
    watched.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_LOOK}</body>"), encoding="utf-8")
    done = _chromium(folder, _framed(watched, folder, width, 900), width, 900, is_dark, "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    complaints = re.findall(r"CONSOLE:\d+\] (.*)", done.stderr)
    return Seen(json.loads(unescape(found[1])), complaints)


def screenshot(page: Path, picture: Path, width: int, height: int, is_dark: bool = False) -> None:
    framed = _framed(page, picture.parent, width, height)
    _chromium(picture.parent, framed, width, height, is_dark, f"--screenshot={picture}")


def print_pages(page: Path, folder: Path, name: str) -> list[Path]:
    """The pages on A4 as pictures."""
    pdf = folder / f"{name}.pdf"
    _chromium(folder, page, 1000, 1000, False, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    subprocess.run(["pdftoppm", "-r", "70", "-png", pdf, folder / name], check=True, timeout=60)
    return sorted(folder.glob(f"{name}-*.png"))


def _framed(page: Path, folder: Path, width: int, height: int) -> Path:
    """A page that shows the other one so wide: a window can't be as narrow as a phone."""
    frame = folder / "frame.html"
    frame.write_text(
        '<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0">'
        f'<iframe src="{escape(page.resolve().as_uri())}" style="border:0;display:block;width:{width}px;'
        f'height:{height}px"></iframe>{_TELL}'
        "<script>addEventListener('message', event => tell(event.data));</script></body>"
    )
    return frame


def _chromium(
    folder: Path, page: Path, width: int, height: int, is_dark: bool, *task: str
) -> subprocess.CompletedProcess:
    words = [
        "chromium", "--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", *task,
    ]  # fmt: skip
    if os.geteuid() == 0:
        words.append("--no-sandbox")  # which the browser refuses to start without as root; the page is our own
    return subprocess.run([*words, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True)
