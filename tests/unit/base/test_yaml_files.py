"""YAML mappings, and one message for everything else."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.base.errors import UserError
from moelpr.base.yaml_files import dump, key_lines, parse_mapping, read_mapping


def test_what_is_dumped_is_read(tmp_path: Path) -> None:
    content = {"b": 1, "a": [1.5, "ä", None, True]}
    (tmp_path / "a.yaml").write_text(dump(content), encoding="utf-8")
    assert read_mapping(tmp_path / "a.yaml", "recipe") == content
    assert dump(content).startswith("b: 1") and "ä" in dump(content)
    assert dump(content, sort_keys=True).startswith("a:")


@pytest.mark.parametrize(
    "text",
    [
        *("- a", "", "a: b: c", "a: [1,", "{", "[" * 5000, "a: " + "[" * 10000 + "]" * 10000, "a: \0", "d: 2020-13-45"),
        *("a: !!bool maybe", "a: !!timestamp maybe", "a: !!int ''"),
        "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
        *("a: !!python/object/apply:os.getpid []", "a: &a [*a]", "a: 0x" + "f" * 5000, f"a: [{10**40}]"),
    ],
)
def test_anything_but_a_mapping_is_a_user_error_on_one_line(text: str) -> None:
    with pytest.raises(UserError, match="the recipe r.yaml") as error:
        parse_mapping(text, "recipe r.yaml")
    assert "\n" not in str(error.value) and "<unicode string>" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a:\n\tb: 1", r"line 2, column 1 \(a tab; indent with spaces\)"), ('a: "b\nc: 1\n', "line 3.* or line 1")],
)
def test_the_line_of_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mapping(text, "recipe r.yaml")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"a: \xff", "not UTF-8")])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"recipe {tmp_path}/r.yaml: {message}"):
        read_mapping(tmp_path / "r.yaml", "recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\na: b: c", r"line 2, column 5 \(mapping values .*\); fix"),
        *(("lr: 1\nseed: 2\nlr: 1", "line 3, .*key lr "), ("a: {b: 1,\n b: 2}", "line 2, .*key b ")),
        ("a:\n- 1: x\n  1: y", "line 3, .*key 1 "),
    ],
)
def test_a_syntax_error_and_a_key_that_is_there_twice_are_named_with_their_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"recipe r.yaml .* {message}"):
        parse_mapping(text, "recipe r.yaml")


def test_keys_of_other_mappings_and_merged_keys_may_be_equal_and_times_are_text() -> None:
    content = parse_mapping("a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: {b: 3}", "recipe r.yaml")
    assert content == {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 3}}
    assert parse_mapping("a: [0123, 24:00:00, 0, 1_000]", "recipe r.yaml") == {"a": ["0123", "24:00:00", 0, 1000]}


keys = st.text("abcdefgh-_", min_size=1, max_size=8)
values = st.recursive(
    st.integers(0, 9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)


@settings(deadline=None)  # other work may keep the machine busy
@given(st.dictionaries(keys, values, min_size=1))
def test_the_line_of_a_key_is_where_it_stands(content: dict) -> None:
    text = dump(content)
    lines, actual = text.splitlines(), key_lines(text)

    def visit(value: object, path: tuple) -> None:
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            line = lines[actual[*path, name] - 1]
            assert f"{name}" in line.replace("'", "") if isinstance(value, dict) else "- " in line or "[" in line
            if isinstance(child, dict | list):
                visit(child, (*path, name))

    visit(content, ())
