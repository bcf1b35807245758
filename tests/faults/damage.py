"""Damage to a file or a command line: changed bytes, changed values, something else in its place."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.support.mutations import mutate

# In the place of a value of JSON or YAML.
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-300, 1e308, float("nan"), float("inf")]
VALUES += [2**31, 2**63, 10**9, 10**30, "", "x", "0", "a b", "ä€😀", "\ud800", "\0", "\x1b[31m", "x" * 1000]
VALUES += ["../../x", "/nowhere/x", "null", "<b>&", [], {}, [[]], [None], {"a": 1}, [1, "a", None], ["x"] * 300]
# Text that no writer would produce, in the place of a value of JSON.
TEXTS = ("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "1" * 5000, "1e99999", "-", "NaN", "Infinity", '"\\ud800"')
# In the place of an argument. No path out of the case's folder, and no device.
WORDS = "0 1 -1 2 3 7 0.5 -0.5 1.5 nan inf -inf 1e309 1e-9 True none 999999 1000000000 99999999999999999999".split()
WORDS += "x ä€😀 a,b , a=b = %s {} * . .. out nowhere nowhere/x text/text.jsonl hf hf/config.json checkpoint".split()
WORDS += ["", " ", "x" * 300, "\n", "-", "--", "--x"]


def damage(path: Path, random: Random) -> str:
    """Damage a file; returns in which way."""
    structured = {".json": _json, ".jsonl": _json_line, ".yaml": _yaml}.get(path.suffix)
    if structured and random.random() < 0.6:
        return structured(path, random)
    return random.choice(_WAYS)(path, random)


def _bytes(path: Path, random: Random) -> str:
    path.write_bytes(mutate(path.read_bytes(), random))
    return "bytes changed"


def _truncate(path: Path, random: Random) -> str:
    size = random.choice([0, 1, random.randrange(max(1, path.stat().st_size))])
    os.truncate(path, size)
    return f"truncated to {size} bytes"


def _zeros(path: Path, random: Random) -> str:
    """As after a crash: the file has its size, but some blocks were never written."""
    content = bytearray(path.read_bytes())
    start = random.randrange(max(1, len(content)))
    stop = random.randint(start, len(content))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"zeros from {start} to {stop}"


def _invert(path: Path, random: Random) -> str:
    content = path.read_bytes()
    start = random.choice([0, 64, random.randrange(max(1, len(content)))])
    path.write_bytes(content[:start] + bytes(byte ^ 255 for byte in content[start:]))
    return f"inverted from byte {start}"


def _swap(path: Path, random: Random) -> str:
    content, size = path.read_bytes(), 1 << random.randint(3, 9)
    blocks = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
    first, second = random.randrange(len(blocks)), random.randrange(len(blocks))
    blocks[first], blocks[second] = blocks[second], blocks[first]
    path.write_bytes(b"".join(blocks))
    return f"blocks {first} and {second} of {size} bytes swapped"


def _remove(path: Path, _: Random) -> str:
    path.unlink()
    return "removed"


def _folder(path: Path, _: Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _other(path: Path, random: Random) -> str:
    if not (others := [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]):
        return _truncate(path, random)
    other = random.choice(others)
    shutil.copyfile(other, path)
    return f"{other.name} in its place"


def _dangling(path: Path, _: Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "a dangling link in its place"


_WAYS: list[Callable[[Path, Random], str]] = [*[_bytes] * 5, _truncate, _zeros, _invert, _swap, _remove, _folder]
_WAYS += [_other, _dangling]


def _json(path: Path, random: Random) -> str:
    text, way = _changed_json(path.read_text("utf-8"), random)
    path.write_text(text, "utf-8", errors="surrogatepass")
    return way


def _json_line(path: Path, random: Random) -> str:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    number = random.randrange(len(lines))
    if random.random() < 0.2:
        lines[number:number] = lines[random.randrange(len(lines)) : len(lines)]
        way = "lines doubled"
    else:
        text, way = _changed_json(lines[number], random, indent=None)
        lines[number] = text + "\n"
    path.write_text("".join(lines), "utf-8", errors="surrogatepass")
    return f"line {number + 1}: {way}"


def _changed_json(text: str, random: Random, indent: int | None = 1) -> tuple[str, str]:
    content, mark = json.loads(text), "a mark that is nowhere else"
    content, way = change(content, random, mark)
    changed = json.dumps(content, indent=indent, ensure_ascii=random.random() < 0.8)
    if random.random() < 0.1 and changed.startswith("{") and content:
        key = random.choice([*content])
        return f"{{{json.dumps(key)}: {json.dumps(random.choice(VALUES))}, {changed[1:]}", f"{key} twice; {way}"
    return changed.replace(json.dumps(mark), random.choice(TEXTS)), way


def _yaml(path: Path, random: Random) -> str:
    content, way = change(yaml.safe_load(path.read_text("utf-8")), random, "{[}")
    text = yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text if random.random() < 0.9 else text + text, "utf-8", errors="surrogatepass")
    return way


def change(content: Any, random: Random, mark: str) -> tuple[Any, str]:
    """Plain Python values with something in them changed, and what.

    Args:
        mark: a value that the caller replaces.
    """
    way = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if not (places := [*_places(content)]):
            return random.choice(VALUES), "an empty file filled"
        holder, key = random.choice(places)
        kind = random.choice(["value", "value", "value", "number", "remove", "rename", "exchange", "mark"])
        way.append(f"{kind} at {str(key)[:60]!r}")
        value = holder[key]
        if kind == "number" and isinstance(value, int | float):
            holder[key] = random.choice([-value, value + 1, value - 1, value * 2, value * 1000, value / 3, str(value)])
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[random.choice([str(key) + "x", "", "format_version"])] = holder.pop(key)
        elif kind == "exchange":
            other, other_key = random.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            # A copy: a later change inside it must not change the table, or put it into itself.
            holder[key] = mark if kind == "mark" else deepcopy(random.choice(VALUES))
    return content, ", ".join(way)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key or index) in plain values."""
    for key in [*content] if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def change_words(words: list[str], flags: list[str], random: Random) -> tuple[list[str], str]:
    """A command line with arguments changed, removed, doubled or added, and which."""
    changed, way = list(words), []
    for _ in range(random.choice([1, 1, 2, 3])):
        place = random.randrange(max(1, len(changed)))
        kind = random.choice(["value", "value", "value", "add", "add", "remove", "double", "misspell"])
        if kind == "value":
            changed[place : place + 1] = [random.choice(WORDS)]
        elif kind == "add":
            changed += [random.choice(flags), *([random.choice(WORDS)] if random.random() < 0.8 else [])]
        elif kind == "remove":
            del changed[place : place + 1]
        elif kind == "double":
            changed[place:place] = changed[place : place + 1]
        else:
            changed[place : place + 1] = [changed[place][:-1]] if changed else []
        way.append(kind)
    return changed, f"{', '.join(way)}: {changed}"
