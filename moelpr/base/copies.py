"""Copies files that come from elsewhere, without following links that lead out of their folder."""

import shutil
from pathlib import Path

from moelpr.base.errors import UserError
from moelpr.base.files import make_folder


def check_links(path: Path, folder: Path) -> None:
    """Check that a file or folder within `folder`, which may come from elsewhere, leads to nothing outside it.

    A copy has what a link leads to, so a published copy would reveal it. In the Hub's cache all files are links, to
    `models--OWNER--NAME/blobs`.

    Raises:
        UserError: there is a link to something else.
    """
    root = folder.resolve()
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        target = entry.resolve()
        is_in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not (target.is_relative_to(root) or is_in_cache):
            raise UserError(
                f"{entry} is a link to {target}, outside {folder}, whose content would be copied and published; remove "
                "it, or put what belongs there in its place"
            )


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder into another one, file by file; those that exist are replaced."""
    check_links(source, source)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            make_folder(copy.parent)
            shutil.copyfile(path, copy)
