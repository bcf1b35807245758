"""A recipe: a YAML mapping whose keys are flags (docs/design/recipes.md)."""

from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.yaml_files import read_mapping


def read_recipe(path: Path) -> dict[str, Any]:
    """`--flag` → value, in the file's order; UserError when it is no mapping, or the record of a run."""
    recipe = read_mapping(path, "recipe")
    if "model_source" in recipe:
        raise UserError(
            f"{path} is the record of a run and no recipe: it names what the flags became; give --recipe the file that "
            "run was started with"
        )
    return {f"--{str(key).replace('_', '-')}": value for key, value in recipe.items()}


def as_words(recipe: dict[str, Any]) -> list[str]:
    """Command-line words: true is the bare flag, false and null no word, a list several values."""
    words: list[str] = []
    for flag, value in recipe.items():
        if value is None or value is False:
            continue
        words.append(flag)
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def recipe_to_flags(path: Path) -> list[str]:
    """The recipe `path` as command-line words."""
    return as_words(read_recipe(path))
