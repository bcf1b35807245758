import re
from pathlib import Path

import pytest

from moelpr.model.layers.config import FIXED_FOR_MOE
from moelpr.train.arguments.flags import all_arguments, own_arguments, supported_arguments
from moelpr.train.arguments.recipes import read_recipe, recipe_argv
from moelpr.train.arguments.supported import REFUSED, SUPPORTED

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def megatrons() -> dict[str, str]:
    """Flag without dashes → Megatron's name."""
    ours = own_arguments().flags()
    return {flag[2:]: action.dest for flag, action in all_arguments().flags().items() if flag not in ours}


def test_every_flag_in_the_table_exists_and_is_there_once(megatrons: dict[str, str]) -> None:
    assert (SUPPORTED.keys() | REFUSED.keys()) <= megatrons.keys()
    assert not SUPPORTED.keys() & REFUSED.keys()
    assert FIXED_FOR_MOE.keys() <= set(megatrons.values())


def test_the_parser_of_supported_flags_takes_what_megatrons_takes() -> None:
    """Numbers are those of one kind, within the same bounds; Megatron's converter of an enumeration is not needed."""
    theirs, ours = all_arguments().flags(), supported_arguments().flags()
    for flag in (f"--{name}" for name in SUPPORTED):
        mine, its = ours[flag], theirs[flag]
        names = [getattr(choice, "name", str(choice)) for choice in its.choices or ()]
        assert (mine.nargs, list(mine.choices or ())) == (its.nargs, names), flag
        kinds = [getattr(one.type, "__name__", "str") for one in (mine, its)]
        assert kinds[0] == kinds[1] or names, flag


def test_recipes_and_commands_in_the_documentation_use_supported_flags_only(megatrons: dict[str, str]) -> None:
    recipes = [*(ROOT / "launch" / "recipes").glob("*.yaml")]
    used = {flag[2:] for recipe in recipes for flag in read_recipe(recipe)}
    assert recipes and used & megatrons.keys() <= SUPPORTED.keys()
    assert not any(all_arguments().parse_tolerantly(recipe_argv(read_recipe(recipe)))[1] for recipe in recipes)
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text().replace("\\\n", "")
        trainings = re.findall(r"^(?:launch/|moelpr train ).*", text, re.MULTILINE)
        flags = {flag for command in trainings for flag in re.findall(r"--([a-z][a-z0-9-]+)", command)}
        assert flags & megatrons.keys() <= SUPPORTED.keys(), page
