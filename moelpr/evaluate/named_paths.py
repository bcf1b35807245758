"""Command-line arguments that name models, texts and languages."""

from collections.abc import Collection
from pathlib import Path

from moelpr.process.command import check_is_utf8
from moelpr.process.errors import UserError


def languages(value: str) -> list[str]:
    return [language.strip() for language in value.split(",") if language.strip()]


def check_languages(original: list[str], languages: Collection[str], flag: str) -> None:
    if unknown := [language for language in original if language not in languages]:
        raise UserError(f"--original-languages {','.join(unknown)} must be among {flag} ({', '.join(languages)})")


def named_paths(items: list[str], flag: str) -> dict[str, Path]:
    """NAME=DIR or LANG=FILE arguments by name; the name of a bare --model path is that of its last folder."""
    form, example = ("NAME=DIR", "base") if flag == "--model" else ("LANG=FILE", "en")
    named: dict[str, Path] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator and flag == "--model":
            name, path = Path(item).resolve().name, item
        check_is_utf8(item, f"{flag} argument")
        if not name or not path:
            raise UserError(f"{flag} must be {form}, such as {example}={item.strip('=')}, got {item}")
        if name in named:
            raise UserError(f"{flag} has {name} twice ({named[name]} and {path}); give each its own name as {form}")
        named[name] = Path(path)
    return named
