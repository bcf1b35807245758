"""A recipe is flags in YAML; what is no flag is said with the key that was most likely meant."""

from pathlib import Path

import pytest

from moelpr.errors import UserError


def test_a_recipe_is_flags_in_yaml(tmp_path: Path) -> None:
    from moelpr.arguments import recipe_to_flags

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1.0e-3\nbf16: true\nuse_distributed_optimizer: false\nsave: null\ndata-path: [1, a, 2, b]\n")
    assert recipe_to_flags(recipe) == ["--lr", "0.001", "--bf16", "--data-path", "1", "a", "2", "b"]


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"just words", b"a: [1,", b"\xff\xfe\x00", b""])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    from moelpr.arguments import recipe_to_flags

    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        recipe_to_flags(tmp_path / "recipe.yaml")


def test_keys_that_are_no_flags_are_all_named(upcycled: str, refused, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("micro-batchsize: 4\nxyzzy: false\nrecipe: other.yaml\nglobal-batch-size: many\nbf16: 1\n")
    said = refused("stage1", upcycled, "--recipe", str(recipe))
    assert len(said) == 5
    assert (
        said[0]
        == f"the recipe {recipe} has the key micro-batchsize, which is no flag; did you mean --micro-batch-size?"
    )
    assert said[1].startswith(f"the recipe {recipe} has the key xyzzy, which is no flag")
    assert said[2].startswith(f"the recipe {recipe} has the key recipe, which is no flag")
    assert said[3].startswith(f"in the recipe {recipe}, --global-batch-size: invalid int value: 'many'")
    assert said[4] == f"in the recipe {recipe}, 1 belongs to no flag; drop it, or name its flag"


def test_the_record_of_a_run_is_no_recipe(upcycled: str, refused, tmp_path: Path) -> None:
    record = tmp_path / "recipe.yaml"
    record.write_text("model_source: runs/upcycled\nlr: 0.1\nconsumed_train_samples: 5\n")
    (said,) = refused("stage1", upcycled, "--recipe", str(record))
    assert said.startswith(f"{record} is the record of a run and no recipe")


def test_a_recipe_can_name_where_the_run_starts(upcycled: str, accepted, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"save: {upcycled}-run\nload: {upcycled}\nfinetune: true\n")
    assert accepted("stage1", upcycled, "--recipe", str(recipe))["model_source"] == upcycled


def test_every_recipe_of_the_project_names_flags_that_exist() -> None:
    from moelpr.arguments import recipe_to_flags
    from moelpr.arguments.flags import all_arguments

    recipes = list((Path(__file__).parents[3] / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert all_arguments().parse_tolerantly(recipe_to_flags(recipe))[1] == [], recipe.name
