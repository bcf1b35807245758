import pytest

from tests.support.house_style import problems_of


@pytest.mark.parametrize(
    "source",
    [
        '"""Of a module."""',
        '"""What it has."""',
        '"""Those of a layer."""',
        "x = 1  # of the weights",
        "# Which is\n# long.",
        "# It is made anew.",
        "# This is none.",
    ],
)
def test_a_problem_is_found(source):
    (problem,) = problems_of("moelpr/a.py", source)
    assert problem.startswith("moelpr/a.py:1: ")


def test_only_commands_declare_flags():
    library = "def flags(parser):\n    parser.add_argument('--flag')\n"
    assert len([*problems_of("moelpr/data/a.py", library)]) == 1
    assert not [*problems_of("moelpr/train/arguments/a.py", library)]
    assert not [*problems_of("moelpr/data/a.py", f"{library}if __name__ == '__main__':\n    pass\n")]
