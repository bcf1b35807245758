"""Checks the rules of CONTRIBUTING.md on style that ruff does not know.

    python -m tests.support.house_style

A docstring and a comment do not start with a clause in the place of a noun ("What", "Those", "Of" …); some words
are refused in both; the formatter is switched off in at most five places; command-line flags are declared in commands,
not in libraries. The exit status is 1 if there is a problem.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADLESS = re.compile(r"(of|which|that|whose|what|those|such)\b", re.IGNORECASE)
REFUSED = {"anew": "again", "beside": "next to"}
REFUSED_WORDS = re.compile(rf"\b(?i:{'|'.join(REFUSED)})\b|(?<!there )\b(?:is|are) none\b(?! of)")
FORMATTER_OFF = re.compile(r"# fmt: ?(skip|off)")
MOST_FORMATTER_OFF = 5
# Other files than commands that may declare flags. A command is run, so it ends with a call under `__main__`.
DECLARE_FLAGS = re.compile(r"moelpr/base/(command|settings)\.py|moelpr/train/arguments/.*|(benchmarks|tests)/.*")


def problems_of(path: str, source: str) -> Iterator[str]:
    """One line `path:line: problem` for each place in a file that breaks a rule."""
    tree = ast.parse(source)
    texts = [(line, "docstring", text) for line, text in docstrings(tree)]
    texts += [(line, "comment", text) for line, text in comments(source)]
    for line, kind, text in sorted(texts):
        if actual := HEADLESS.match(text):
            yield f'{path}:{line}: a {kind} starts with "{actual[0]}"; start with a verb or a noun and its article'
        for actual in REFUSED_WORDS.finditer(text):
            better = REFUSED.get(actual[0].lower(), "say what it is")
            yield f'{path}:{line}: "{actual[0]}" in a {kind}; write: {better}'
    if "__main__" not in (*names_compared(tree), Path(path).stem) and not DECLARE_FLAGS.fullmatch(path):
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "add_argument"]
        if names:
            yield f"{path}:{names[0].lineno}: flags are declared in a library; declare them in commands"


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """The first line and text of each comment; lines with nothing else that follow one another are one comment."""
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#!: ")
        is_alone = token.line.strip().startswith("#")
        if block and is_alone and block[-1][0] == line - 1:
            block.append((line, text))
            continue
        if block:
            yield block[0][0], " ".join(text for _, text in block)
        block = [(line, text)] if is_alone else []
        if not is_alone:
            yield line, text
    if block:
        yield block[0][0], " ".join(text for _, text in block)


def names_compared(tree: ast.Module) -> set[str]:
    """The constants that conditions at the top of a module compare with, such as `__main__`."""
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return {str(node.value) for test in tests for node in ast.walk(test) if isinstance(node, ast.Constant)}


def all_problems() -> list[str]:
    """The problems of every Python file that git tracks."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    sources = {path: (ROOT / path).read_text() for path in files.stdout.split()}
    actual = [problem for path, source in sources.items() for problem in problems_of(path, source)]
    off = [path for path, source in sources.items() for _ in FORMATTER_OFF.findall(source)]
    if len(off) > MOST_FORMATTER_OFF:
        actual.append(f"the formatter is switched off in {len(off)} places, at most {MOST_FORMATTER_OFF} are allowed")
    return actual


if __name__ == "__main__":
    found = all_problems()
    print(*found, f"{len(found)} problems of style", sep="\n")
    sys.exit(bool(found))
