"""The command `moelpr`, which runs every tool: `moelpr SUBCOMMAND …`, or `python -m moelpr SUBCOMMAND …`.

`moelpr --help` lists the subcommands.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable

from moelpr import __version__
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.tools import COMMANDS, DEFAULTS, GROUPS, STAGES, TOOLS, TRAIN

HELP = ("-h", "--help")


def main() -> None:
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that it starts imports a user's yaml.py or tokenize.py
    if sys.argv[1:2] in (["layouts"], ["plan"], ["run"], ["status"]):
        # transformers, which reads config.json for them, would import torch, which takes two seconds.
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    run_command(lambda: run(sys.argv[1:]))


def run(words: list[str]) -> None:
    """Run a subcommand with its arguments; its usage and its errors have its name."""
    if words[:1] == ["--version"]:
        print(f"moelpr {__version__}")
        return
    if (groups := asked_for_list(words)) is not None:
        print(usage(groups))
        return
    name, arguments = find(words)
    if name == TRAIN:
        train(arguments)
    else:
        start(name, arguments)


def start(name: str, words: list[str]) -> None:
    """Run a tool under its name as subcommand."""
    from moelpr.base.settings import call  # only now: --help takes a tenth of a second

    sys.argv = [f"moelpr {name}", *words]
    call(COMMANDS[name].load(), words)


def asked_for_list(words: list[str]) -> list[str] | None:
    """The titles of the groups whose list is asked for: of all, or those of `data` or `model`."""
    first, second = [*words, "--help", "--help"][:2]
    if first in HELP:
        return list(GROUPS)
    titles = [title for title, group in GROUPS.items() if any(name.startswith(f"{first} ") for name in group)]
    return titles if titles and second in HELP else None


def find(words: list[str]) -> tuple[str, list[str]]:
    """The subcommand that `words` start with, of one or two of them, and the words after it.

    Raises:
        UserError: There is no such subcommand.
    """
    for length in (2, 1):
        if (name := " ".join(words[:length])) in TOOLS:
            return name, words[length:]
    if words[0] in DEFAULTS:
        return DEFAULTS[words[0]], words[1:]
    is_group = any(name.startswith(f"{words[0]} ") for name in TOOLS)
    given = " ".join(words[: 1 + is_group])
    last = given.split(" ")[-1]
    by_last = dict.fromkeys(STAGES, TRAIN) | {name.split()[-1]: name for name in TOOLS}
    meant = difflib.get_close_matches(last, by_last, n=1)
    hint = f" did you mean {by_last[meant[0]]}?" if meant else ""
    raise UserError(f"there is no subcommand {given};{hint} moelpr --help lists them")


def train(arguments: list[str]) -> None:
    """Start a stage on this node."""
    stage, *arguments = arguments or ["--help"]
    if stage in HELP:
        print("usage: moelpr train STAGE [arguments]; moelpr train STAGE --help lists them\n")
        print(table(STAGES))
        return
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {', '.join(STAGES)}")
    if stage == "lora":  # without Megatron
        return start("train lora", arguments)
    sys.argv = [f"moelpr train {stage}", *arguments]
    importlib.import_module("moelpr.train.launcher").launch(stage, arguments)


def usage(groups: Iterable[str]) -> str:
    parts = ["usage: moelpr SUBCOMMAND [arguments]; moelpr SUBCOMMAND --help lists them"]
    parts += [f"{title}:\n" + table({name: tool.help for name, tool in GROUPS[title].items()}) for title in groups]
    return "\n\n".join([*parts, "moelpr --version prints the version."])


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<23} {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
