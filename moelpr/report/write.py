"""A report's files."""

from pathlib import Path

from moelpr.files import atomic_file
from moelpr.report.document import Document
from moelpr.report.to_html import to_html
from moelpr.report.to_markdown import to_markdown


def write_document(folder: Path, document: Document) -> Path:
    """Write report.html and report.md into `folder`, replacing what is there. Returns the page's path."""
    for name, text in (("report.md", to_markdown(document)), ("report.html", to_html(document))):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "report.html"
