import re
import subprocess
import sys

import pytest

from moelpr.train.arguments.flags import all_arguments, own_arguments


def parse(*argv: str) -> tuple[dict, list[str]]:
    namespace, problems = all_arguments().parse_tolerantly(list(argv))
    return vars(namespace), problems


def test_valid_arguments_are_parsed_next_to_wrong_ones() -> None:
    argv = "--lr fast --seq-length 32 --lpr-loss mine --seed --no-such-thing 5 --stage stage1"
    settings, problems = parse(*argv.split())
    assert (settings["seq_length"], settings["stage"]) == (32, "stage1")
    actual = [line.split(":")[0].split(";")[0] for line in problems]
    last = "unrecognized argument --no-such-thing"
    assert actual == ["--lr must be at least 0, got fast", "--lpr-loss", "--seed", last]
    assert "fast" in problems[0] and "paper, reference" in problems[1]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--tensor-parallel-size=2", [" --tensor-parallel-size;", "did you mean --tensor-model-parallel-size?"]),
        ("--balance_loss_coeff", [" --balance_loss_coeff;", "did you mean --balance-loss-coeff?"]),
        ("--xyzzy", [" --xyzzy;", "--help-all"]),
        ("--bf16 yes", [" yes;"]),
        ("--moe-layer-freq [1]*(", ["--moe-layer-freq:", "'[1]*('"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_helps(argv: str, parts: list[str]) -> None:
    (problem,) = parse(*argv.split())[1]
    assert all(part in problem for part in parts)


def test_help_shows_our_flags_without_megatron_and_help_all_shows_megatrons(capsys) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "moelpr.pretrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--stage" in done.stdout and "\nMegatron's flags: --help-all" in done.stdout and " 75 if" in done.stdout
    assert not re.search(r"\| +(torch|megatron)\b", done.stderr)
    with pytest.raises(SystemExit) as end:
        parse("--help-all")
    assert end.value.code == 0
    assert {"--stage", "--micro-batch-size"} <= set(capsys.readouterr().out.split())


def test_the_help_of_each_of_our_flags_states_its_default_or_that_it_is_required() -> None:
    for action in own_arguments()._actions:
        assert action.nargs == 0 or "default: " in action.help or "(required)" in action.help, action.option_strings
