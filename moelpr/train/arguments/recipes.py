"""Recipes: YAML files of flags (docs/design/recipes.md)."""

from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.tools import launch_folder
from moelpr.base.yaml_files import read_mapping


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as `--flag` → value, by its file or by the name of one of moelpr's; UserError if it cannot be read."""
    path = find_recipe(path)
    if not path.exists():
        raise UserError(f"there is no recipe {path}; pass an existing file, or the name of a recipe, like paper-stage1")
    recipe = read_mapping(path, "recipe")
    if "model_source" in recipe:
        raise UserError(
            f"{path} records a run's resolved flags; it is not a recipe; pass --recipe the file that the run was "
            "started with"
        )
    return {f"--{str(key).replace('_', '-')}": value for key, value in recipe.items()}


def find_recipe(path: Path) -> Path:
    """The file of a recipe, which may be named like one that comes with moelpr."""
    ours = launch_folder() / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
    return ours if not path.exists() and path.parent == Path() and ours.exists() else path


def recipe_argv(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line arguments: true becomes the bare flag, false and null nothing, a list several values."""
    argv: list[str] = []
    for flag, value in recipe.items():
        if value is None or value is False:
            continue
        argv.append(flag)
        if value is not True:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv
