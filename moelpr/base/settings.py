"""A command is a function of its settings, a class, of whose fields its flags are made.

    class Settings(Flags):
        corpus: Annotated[str, POSITIONAL]  # path of the corpus
        documents: Count = 3  # documents to show

    def main(settings: Settings) -> None: ...

reads `CORPUS [--documents N]`. The comment behind a field, or above it, is the flag's help, to which its default is
added. Fields of a base class are a group, titled by its docstring. A `list` is several values. A type's notes are
options of `add_argument`. What flags require of each other is checked in `__post_init__`.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, dataclass_transform, get_args, get_origin

from moelpr.base.command import CommandParser, run_command

INF = float("inf")
POSITIONAL = {"positional": True}
REPEATED: dict[str, Any] = {"action": "append", "nargs": None}  # given once for each value
_METAVARS = {int: "N", float: "X", Path: "PATH"}


def number(
    kind: type[int] | type[float], least: float = -INF, most: float = INF, above: float = -INF, below: float = INF
) -> Any:
    """The note of a number in a range."""
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    limit = " and ".join(f"{name} {value:,}" for name, value in limits.items() if abs(value) < INF) or "a number"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text[:40]}")
        return value

    convert.__name__ = kind.__name__
    return {"type": convert, "metavar": _METAVARS[kind]}


def either(name: str, required: bool = False) -> Any:
    """The note of flags that exclude each other: all with this name, of which one may be required."""
    return {"either": (name, required)}


def choices(names: Iterable[str]) -> Any:
    return {"choices": [*names], "metavar": None}


def metavar(name: str | tuple[str, ...]) -> Any:
    return {"metavar": name}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


Folder = Annotated[Path, metavar("DIR")]
File = Annotated[Path, metavar("FILE")]
Natural = Annotated[int, number(int, 0)]
Count = Annotated[int, number(int, 1)]
Names = Annotated[list[str], {"nargs": None, "type": _names, "metavar": "A,B,..."}]
Share = Annotated[float, number(float, 0, 1)]


@dataclass_transform(kw_only_default=True)
class Flags:
    """Settings of a command, or some that several commands have; subclasses are dataclasses."""

    def __init_subclass__(cls) -> None:
        for name, value in {**vars(cls)}.items():
            if isinstance(value, list):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        cls.__doc__ = cls.__doc__ or " "  # or it would get one
        dataclasses.dataclass(kw_only=True)(cls)


def settings_of(command: Callable[[Any], None]) -> type[Flags]:
    """The class of a command's settings."""
    [parameter] = inspect.signature(command).parameters.values()
    annotation: type[Flags] = parameter.annotation
    return annotation


def call(command: Callable[[Any], None], words: Sequence[str]) -> None:
    """Run a command with the settings that these words are."""
    if not inspect.signature(command).parameters:
        return command()  # type: ignore[call-arg]
    own = sys.modules[command.__module__] if command.__name__ == "main" else command
    command(parse(settings_of(command), words, inspect.getdoc(own)))


def run_script(command: Callable[[Any], None]) -> None:
    """Run a command whose file was started, as `python data_tools/preprocess_data.py`."""
    run_command(lambda: call(command, sys.argv[1:]))


def parse[S: Flags](settings: type[S], words: Sequence[str], description: str | None = None) -> S:
    """Parse the words of a command line, or raise a `UserError`."""
    values = vars(parser_of(settings, description).parse_args(words))
    values.pop("debug")
    return settings(**values)


def flags_of(settings: type[Flags] | argparse.ArgumentParser) -> set[str]:
    """The flags of a command or a parser, without dashes."""
    parser = settings if isinstance(settings, argparse.ArgumentParser) else parser_of(settings)
    return {flag[2:] for flag in parser._option_string_actions if flag.startswith("--")}


def parser_of(settings: type[Flags], description: str | None = None) -> CommandParser:
    parser = CommandParser(description=description)
    add_flags(parser, settings)
    return parser


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type[Flags]) -> None:
    """Add a flag for each field."""
    groups: dict[Any, Any] = {}
    owners = {name: one for one in reversed(settings.__mro__) for name in one.__dict__.get("__annotations__", ())}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        owner = owners[field.name]
        group: Any = parser
        if owner is not settings and owner.__doc__ != " ":
            group = groups[owner] = groups.get(owner) or parser.add_argument_group(owner.__doc__)
        names, options = _arguments(field, _helps(owner).get(field.name, ""))
        if exclusion := options.pop("either", None):
            options.pop("required")
            groups[exclusion] = groups.get(exclusion) or group.add_mutually_exclusive_group(required=exclusion[1])
            group = groups[exclusion]
        group.add_argument(*names, **options)


@cache
def _helps(settings: type[Flags]) -> dict[str, str]:
    """The comments of fields."""
    helps, above = {}, []
    for line in inspect.getsource(settings).splitlines():
        code, _, comment = line.strip().partition("# ")
        above.append(comment)
        if code:
            helps[code.split(":")[0]] = " ".join(above).strip().replace("%", "%%")
            above = []
    return helps


def _arguments(field: dataclasses.Field[Any], text: str) -> tuple[Sequence[str], dict[str, Any]]:
    """The names of a flag, and the arguments of `add_argument`."""
    kind, *notes = _unwrapped(field.type)
    note = {name: value for one in notes for name, value in one.items()}
    flag = "--" + field.name.replace("_", "-")
    makes, default = field.default_factory, field.default
    default = makes() if makes is not dataclasses.MISSING else default
    is_required = default is dataclasses.MISSING
    options: dict[str, Any] = {"help": text} | ({} if is_required else {"default": default})
    if kind is bool and default is True:
        flag, options["action"] = f"--no{flag[1:]}", "store_false"
    elif kind is bool:
        options["action"] = "store_true"
    elif get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif note.get("action") != "store_const":
        options |= {"type": kind, "metavar": _METAVARS.get(kind, re.split("[-_]", flag)[-1].upper())}
    options |= note
    shows_default = not (is_required or default in (None, [], "") or kind is bool or "const" in options)
    if shows_default and "(default" not in text:
        options["help"] += " (default: %(default)s)"
    if options.pop("positional", False):
        options |= {"metavar": note.get("metavar", field.name.upper())}
        return [field.name], options if is_required else {"nargs": "?"} | options
    return options.pop("names", [flag]), options | {"dest": field.name, "required": is_required}


def _unwrapped(hint: Any) -> Iterator[Any]:
    """A type without `Annotated`, None and `list`, and its notes, of which a later one overrides."""
    inner, *notes = get_args(hint) or [hint]
    if get_origin(hint) in (Union, UnionType, Annotated, list):
        yield from _unwrapped(inner)
        yield from {Annotated: notes, list: [{"nargs": "+"}]}.get(get_origin(hint), [])
    else:
        yield hint
