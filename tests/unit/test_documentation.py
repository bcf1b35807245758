"""The Markdown files name links, commands, flags and paths that exist, and the code they print works."""

import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelpr.base.settings import flags_of, settings_of
from moelpr.base.tools import COMMANDS, DEFAULTS, STAGES
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.check import commands as check
from moelpr.train.launcher import OPTIONS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
LAUNCHERS = {f"launch/{stage}.sh": f"train {stage}" for stage in STAGES}
SUBCOMMANDS = {*COMMANDS, *DEFAULTS, *LAUNCHERS.values()} - {"train"}
FOLDERS = "benchmarks|checkpoint_convert|data_tools|docs|examples|launch|moelpr|tests"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    actual: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(path.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        actual.append(f"{slug}-{actual.count(slug)}" if slug in actual else slug)
    return set(actual)


def test_relative_links_and_anchors_resolve() -> None:
    broken = []
    for page in DOCUMENTS:
        for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", without_code(page.read_text("utf-8"))):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text("utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md")}
    assert {page for page in pages if f"({page})" not in index} == {"README.md"}


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+(?:-[a-z]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text("utf-8") for path in DOCUMENTS)
    named = {*re.findall(r"(?:^ *|`)make ([a-z]+(?:-[a-z]+)*)", text, re.MULTILINE)}
    assert "test" in named and named <= targets


def test_named_paths_exist() -> None:
    examples = {"moelpr/a/b.py", "tests/unit/a/test_b.py"}
    named = {
        path: page.name
        for page in DOCUMENTS
        for path in re.findall(rf"`((?:{FOLDERS})/[^`\s]*)`", page.read_text("utf-8"))
    }
    assert {path: page for path, page in named.items() if not any(ROOT.glob(path.rstrip("/")))}.keys() == examples


def test_the_pages_that_code_names_exist() -> None:
    command = ["git", "ls-files", "*.py", "*.sh", "*.sbatch", "*.cpp", "*.yaml"]
    texts = {
        name: (ROOT / name).read_text("utf-8") for name in subprocess.check_output(command, cwd=ROOT, text=True).split()
    }
    named = {
        page: name for name, text in texts.items() for page in re.findall(r"\bdocs/[\w/.-]+\.(?:md|json|svg)", text)
    }
    assert not {page: name for page, name in named.items() if not (ROOT / page).exists()}


def lines_of_blocks(text: str) -> list[str]:
    """The command lines in code blocks of `text`."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_hf_takes_the_patterns_of_downloads_as_patterns() -> None:
    """A second pattern after --include is the name of a file for it, for which it ignores the first."""
    lines = [
        shlex.split(line)
        for page in DOCUMENTS
        for line in lines_of_blocks(page.read_text("utf-8"))
        if line[:3] == "hf "
    ]
    downloads = [words[2:] for words in lines if words[1] == "download"]
    assert len(downloads) > 4
    for words in downloads:  # all options have a value
        repository, *files = [
            word for before, word in pairwise(["", *words]) if not word.startswith("-") and not before.startswith("-")
        ]
        assert "/" in repository and not files, files


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The subcommand of each `moelpr` in code blocks and code spans of `text`, and the flags it is given."""
    for line in [*lines_of_blocks(text), *re.findall(r"`([^`\n]+)`", without_code(text))]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a placeholder that is not shell syntax
            continue
        name, flags = "", []
        for position, word in enumerate(words):
            if started := LAUNCHERS.get(word) or (word == "moelpr" and subcommand(words[position + 1 :])):
                yield name, flags
                name, flags = started, []
            elif re.match(r"--[a-z]", word):
                flags.append(re.split(r"[=)]", word)[0])
        yield name, flags


def subcommand(words: list[str]) -> str:
    """The longest name that `words` start with and that can be asked for help."""
    starts = [" ".join(words[:length]) for length in (2, 1)]
    return next((name for name in starts if name in SUBCOMMANDS), "")


@functools.cache
def flags_named(name: str) -> set[str]:
    """The flags of a command."""
    trainers = set(all_arguments().flags())
    if name in LAUNCHERS.values() and name != "train lora":
        return {*trainers, *OPTIONS, "--dry-run"}
    kind = check.Settings if name == "check" else settings_of(COMMANDS[DEFAULTS.get(name, name)].load())
    return {f"--{flag}" for flag in flags_of(kind)} | (trainers if name == "check" else set())


def test_flags_of_documented_commands_exist() -> None:
    uses = [
        (page.name, name, flag)
        for page in DOCUMENTS
        for name, flags in commands(page.read_text("utf-8"))
        for flag in flags
        if name
    ]
    named = {name for page, name, _ in uses if page == "steps.md"}
    assert named >= {"model convert", "evaluate", "layouts", "data preprocess", "train stage1"}
    assert not [use for use in uses if use[2] not in {*flags_named(use[1]), "--help"}]


def test_pages_give_no_text_to_keep_twice() -> None:
    """`data kept` writes a file for each language but those named, and a command refuses two texts of one name."""
    pages = [page for page in DOCUMENTS if re.search(r"data kept .*--without", page.read_text())]
    for page in pages:
        [without] = re.findall(r"data kept .*--without ([\w,]+)", page.read_text())
        assert {*re.findall(r"-text (\w+)=", page.read_text())} <= {*without.split(",")}, page
    assert len(pages) >= 2


def test_the_generated_results_have_their_place() -> None:
    text = (ROOT / "docs/results-details.md").read_text("utf-8")
    assert text.count("<!-- demo-table:start -->") == text.count("<!-- demo-table:end -->") == 1


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 1003])
def test_the_documented_reader_reads_lang_files(num_tokens: int, tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data-format.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    read_language_bits = names["read_language_bits"]
    bits = np.random.default_rng(num_tokens).integers(0, 2, num_tokens, dtype=np.uint8)
    with LanguageBitsWriter(tmp_path / "a.lang") as writer:
        writer.append(bits)
        writer.finalize()
    assert read_language_bits(tmp_path / "a.lang") == bits.tolist()
    if num_tokens:
        content = bytearray((tmp_path / "a.lang").read_bytes())
        content[-1] ^= 1
        (tmp_path / "a.lang").write_bytes(content)
        with pytest.raises(AssertionError):
            read_language_bits(tmp_path / "a.lang")
