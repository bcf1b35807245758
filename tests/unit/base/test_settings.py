from typing import Annotated, Literal

import pytest

from moelpr.base.errors import UserError
from moelpr.base.settings import (
    POSITIONAL,
    REPEATED,
    Count,
    Flags,
    Folder,
    Names,
    Share,
    call,
    either,
    flags_of,
    number,
    parse,
    parser_of,
)


class Shared(Flags):
    """shared"""

    verbose: bool = False  # say more


class Settings(Shared):
    corpus: Annotated[str, POSITIONAL]  # path
    other: Annotated[Folder | None, POSITIONAL] = None  # another
    kind: Literal["a", "b"]  # one of two
    # text to read, of which there
    # may be 100%
    input: Annotated[list[str], either("source", required=True)] = []
    count: Annotated[Count | None, either("source", required=True)] = None  # how many
    again: Annotated[list[str], REPEATED] = []  # once per value
    names: Names = []  # separated by commas
    share: Share = 0.5  # a fraction
    below: Annotated[float, number(float, 0, below=1)] = 0.1  # above (default: little)
    bold: bool = True  # thin

    def __post_init__(self) -> None:
        if self.names and self.again:
            raise UserError("--names excludes --again")


REQUIRED = "x --kind a --count 3"


def test_fields_become_flags_of_their_types() -> None:
    words = "x y --kind b --input a b --again 1 --again 2 --share 1 --no-bold --verbose"
    expected = Settings(corpus="x", kind="b", input=["a", "b"], again=["1", "2"], share=1, bold=False, verbose=True)
    parsed = parse(Settings, words.split())
    assert parsed.other is not None and parsed.other.name == "y"
    parsed.other = None
    assert parsed == expected
    assert parse(Settings, f"{REQUIRED} --names a,b,".split()).names == ["a", "b"]
    assert flags_of(Settings) == {*"help debug kind input count again names share below no-bold verbose".split()}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("x --count 3", "required: --kind"),
        ("x --kind a", "--input --count"),
        (f"{REQUIRED} --input a", "--input: not allowed with argument --count"),
        (f"{REQUIRED} --kind c", "--kind: .*a.*b"),
        ("x --kind a --count 0", "^--count must be at least 1, got 0;"),
        ("x --kind a --count 1.5", "--count must .*1.5"),
        (f"{REQUIRED} --share nan", "--share .*at most 1, got nan"),
        (f"{REQUIRED} --below 1", "--below .*below 1, got 1"),
        (f"{REQUIRED} --shares 1", "--shares; did you mean --share?"),
        (f"{REQUIRED} --names a --again b", "--names excludes --again"),
    ],
)
def test_a_wrong_flag_is_named(words: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse(Settings, words.split())


def test_help_has_comments_and_defaults_in_groups(capsys) -> None:
    def command(settings: Settings) -> None:
        """Do it."""

    with pytest.raises(SystemExit) as end:
        call(command, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert not end.value.code and " Do it. " in shown
    assert "text to read, of which there may be 100%" in shown and "--share X a fraction (default: 0.5)" in shown
    assert "above (default: little)" in shown and shown.endswith("shared: --verbose say more")
    assert "(required)" in shown.partition("one of two ")[2][:10]


def test_lists_are_not_shared() -> None:
    first, second = (parse(Settings, REQUIRED.split()) for _ in range(2))
    first.again.append("a")
    assert not second.again and not parser_of(Settings).parse_args(REQUIRED.split()).again
