import json
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.model.metrics.run_metrics import mean_of, read_run_metrics


def write(folder: Path, *records: dict, end: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return path


def test_records_are_sorted_by_kind(tmp_path: Path) -> None:
    validation, warning = {"iteration": 0, "event": "validation", "languages": {}}, {"iteration": 1, "event": "warning"}
    unknown = {"iteration": 1, "event": "of a later version"}
    path = write(tmp_path, validation, {"iteration": 1}, warning, unknown, {"iteration": 2})
    actual = read_run_metrics(path)
    assert actual.steps == [{"iteration": 1}, {"iteration": 2}]
    assert (actual.validations, actual.warnings) == ([validation], [warning])


def test_the_last_record_of_a_repeated_step_counts(tmp_path: Path) -> None:
    records = [{"iteration": step, "lm_loss": run} for run, steps in ((1, (1, 2, 3)), (2, (2, 3, 4))) for step in steps]
    assert [record["lm_loss"] for record in read_run_metrics(write(tmp_path, *records)).steps] == [1, 2, 2, 2]


def test_an_incomplete_last_line_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    assert len(read_run_metrics(write(tmp_path, {"iteration": 1}, end='\n\n{"iteration": 2')).steps) == 1


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[]", "not JSON", '{"iteration": true}', "[" * 100_000),
        '{"iteration": 1, "lm_loss": "abc"}',
        '{"iteration": 1, "original_first_share_original": [0.5, [0.5]]}',
        '{"iteration": 1, "original_first_share_original": [0.5]}',
        '{"iteration": 1, "all_original_share_original": [0.5, 1], "all_original_share_expanded": [0.5, 1, 0]}',
        '{"iteration": 1, "token_share": [[1.0, 1.0], [1.0]]}',
        '{"iteration": 1, "event": ["validation"]}',
        '{"iteration": 1, "event": "validation", "languages": {"en": {"group": "new", "bits_per_byte": 2.0}}}',
    ],
)
def test_a_malformed_line_and_one_with_other_layers_are_named(tmp_path: Path, line: str) -> None:
    first = {"iteration": 1, "original_first_share_original": [0.5, None]}
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 .*remove it"):
        read_run_metrics(write(tmp_path, first, end=f"{line}\n"))


def test_numbers_that_cannot_be_computed_with_are_missing(tmp_path: Path) -> None:
    line = '{"iteration": 1, "lm_loss": NaN, "grad_norm": -Infinity, "lpr_loss": 1e999, "tokens_per_s": 1%s}\n'
    [step] = read_run_metrics(write(tmp_path, end=line % ("0" * 400))).steps
    assert step == {"iteration": 1, "lm_loss": None, "grad_norm": None, "lpr_loss": None, "tokens_per_s": None}


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics.jsonl .No such file"):
        read_run_metrics(tmp_path / "metrics.jsonl")


def test_values_per_layer_are_kept_at_both_ends_only(tmp_path: Path) -> None:
    share = "original_first_share_original"
    records = [{"iteration": n, share: [n, n + 2, None], "token_share": [[1.0]] * 3} for n in range(1, 8)]
    steps = read_run_metrics(write(tmp_path, *records), layers_at_ends=2).steps
    assert [steps[index] for index in (0, 1, 5, 6)] == [records[index] for index in (0, 1, 5, 6)]
    assert steps[3] == {"iteration": 4, share: 5.0, "token_share": None}


@pytest.mark.parametrize(("value", "mean"), [([1, 2.0, None], 1.5), ([None], None), ([], None), (3, 3), ("a", None)])
def test_the_mean_is_over_numbers(value: object, mean: float | None) -> None:
    assert mean_of(value) == mean
