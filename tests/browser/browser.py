"""A page in a headless browser: what it drew, its console messages, and screenshots of it."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

# A page's reports are written into it, so that --dump-dom prints them.
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

# Runs in the page: what a reader sees of each chart, and whether the page is wider than the screen. It reports to the
# page around it, because the browser prints the outermost one only.
_LOOK = """
<script>
addEventListener("load", () => {
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
  parent.postMessage({
    charts, scrolled: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).length,
    repeated_ids: ids.length - new Set(ids).size,
    width: innerWidth, page_width: page.scrollWidth, height: page.scrollHeight,
    ink: style.color, paper: style.backgroundColor,
  }, "*");
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """found: what _LOOK found; complaints: console messages."""

    found: dict[str, Any]
    complaints: list[str]


def missing_programs() -> list[str]:
    return [name for name in ("chromium", "pdftoppm") if shutil.which(name) is None]


def look(page: Path, folder: Path, width: int, is_dark: bool = False) -> Seen:
    """Open the page `width` pixels wide. folder: for temporary files."""
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
    """The page printed on A4, one image per sheet."""
    pdf = folder / f"{name}.pdf"
    _chromium(folder, page, 1000, 1000, False, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    subprocess.run(["pdftoppm", "-r", "70", "-png", pdf, folder / name], check=True, timeout=60)
    return sorted(folder.glob(f"{name}-*.png"))


def _framed(page: Path, folder: Path, width: int, height: int) -> Path:
    """A page that shows the other one in a frame, because a window cannot be as narrow as a phone."""
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
    words = "chromium --headless --disable-gpu --hide-scrollbars --enable-logging=stderr".split()
    words += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    words += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", *task]
    if os.geteuid() == 0:
        words.append("--no-sandbox")  # required as root; the page is our own
    return subprocess.run([*words, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True)
