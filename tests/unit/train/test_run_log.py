import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.model.metrics.run_metrics import read_run_metrics
from moelpr.train import run_log
from moelpr.train.early_warnings import EarlyWarning, EarlyWarnings
from moelpr.train.run_log import RunLog, open_metrics, report_nonfinite_exit


class Writer:
    """Replaces the writer of TensorBoard, and what sends to trackers."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written[tag] = (value, step)

    def flush(self) -> None:
        self.num_flushed = len(self.written)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.written |= {tag: (value, step) for tag, value in values.items()}

    def close(self) -> None:
        self.is_closed = True


def make_log(monkeypatch: pytest.MonkeyPatch, save: Path, log_interval: int = 1) -> tuple[RunLog, Writer, Writer]:
    board, tracking, stage = Writer(), Writer(), SimpleNamespace(name="stage1")
    settings: Any = SimpleNamespace(save=save, log_interval=log_interval, last_step=3, stage=stage)
    monkeypatch.setattr(run_log, "get_tensorboard_writer", lambda: board)
    warnings = EarlyWarnings("stage1", lpr_loss_is_on=False)
    return RunLog(settings, warnings, lambda is_new: tracking), board, tracking


def held_out(iteration: int, bits: float) -> dict:
    languages = {"en": {"group": "original", "lm_loss": bits, "bits_per_byte": bits}}
    return {"iteration": iteration, "event": "validation", "stage": "stage1", "languages": languages}


def test_a_validation_pass_and_its_warning_reach_file_log_and_both_boards(monkeypatch, tmp_path, capsys) -> None:
    log, board, tracking = make_log(monkeypatch, tmp_path)
    log.observers.append(lambda record: None if "event" in record else [EarlyWarning("other", "seen")])
    log.write(held_out(0, 2.0))
    log.write({"iteration": 1, "lm_loss": 3.0, "step_time_s": 1.0})
    log.write(held_out(1, 2.5))
    log.close()
    actual = read_run_metrics(tmp_path / "metrics.jsonl")
    assert [record["iteration"] for record in actual.validations] == [0, 1]
    assert [record["kind"] for record in actual.warnings] == ["other", "original_loss_rises"]
    assert board.written["validation bits per byte/en"] == (2.5, 1) and board.num_flushed == len(board.written)
    step = {"lm loss": (3.0, 1), "run/step": (1.0, 1)}
    assert tracking.written == step | {"validation bits per byte/en": (2.5, 1)} and tracking.is_closed
    printed = capsys.readouterr().err
    assert "stage1 step 0, validation: en 2.0000 bits per byte" in printed
    assert "moelpr: warning: stage1 step 1: the loss on held-out en +25.0%" in printed


def test_trackers_get_the_lpr_loss_and_routing_as_means_over_layers(monkeypatch, tmp_path) -> None:
    log, _, tracking = make_log(monkeypatch, tmp_path)
    step = {"iteration": 1, "lm_loss": 3.0, "step_time_s": 1.0}
    shares = {"original_first_share_original": [0.5, 1.0], "original_first_share_expanded": [None, None]}
    log.write(step | shares | {"lpr_loss": None})
    own = {"lm loss": (3.0, 1), "run/step": (1.0, 1)}
    assert tracking.written == own | {"original_first_share_original": (0.75, 1)}
    log.write(step | {"iteration": 2, "lpr_loss": 0.25})
    assert tracking.written["lpr loss"] == (0.25, 2)
    log.close()


def test_a_resumed_run_keeps_earlier_records_and_repeats_no_warning(monkeypatch, tmp_path) -> None:
    first, _, _ = make_log(monkeypatch, tmp_path)
    first.write(held_out(0, 2.0))
    for step in (1, 2, 3):
        first.write({"iteration": step, "lm_loss": 3.0, "step_time_s": 1.0})
        first.write(held_out(step, 2.5))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lm_l')
    resumed, _, _ = make_log(monkeypatch, tmp_path)
    resumed.write({"iteration": 3, "lm_loss": 2.0, "step_time_s": 1.0})
    resumed.write(held_out(3, 2.6))
    resumed.close()
    actual = read_run_metrics(tmp_path / "metrics.jsonl")
    assert [record["lm_loss"] for record in actual.steps] == [3.0, 3.0, 2.0]
    assert [record["iteration"] for record in actual.validations] == [0, 1, 2, 3]
    assert len(actual.warnings) == 1


@pytest.mark.parametrize("line", [b"[]", b"PK\x80", b"[" * 100_000])
def test_a_malformed_line_is_named_and_left_out_but_no_other(tmp_path: Path, capsys, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + line + b'\n{"iteration": 2}\n{"iteration"')
    open_metrics(path, before_iteration=9).close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2]
    assert capsys.readouterr().err == f"moelpr: warning: {path}, line 2 is damaged and left out\n"


def test_values_per_layer_reach_tensorboard_once_per_log_interval(monkeypatch, tmp_path) -> None:
    log, board, _ = make_log(monkeypatch, tmp_path, log_interval=2)
    record = {"lm_loss": 3.0, "step_time_s": 1.0, "original_first_share_original": [0.5, None], "lpr_loss": 0.25}
    record["token_share"] = [[1.0, 0.75, 0.25]]
    log.write({"iteration": 1} | record)
    assert board.written == {"lpr loss": (0.25, 1)}
    log.write({"iteration": 2} | record | {"lpr_loss": None})
    shares = {f"token share, moe layer 0/expert {expert}": (share, 2) for expert, share in enumerate((1.0, 0.75, 0.25))}
    assert board.written == {"lpr loss": (0.25, 1), "original_first_share_original/moe layer 0": (0.5, 2)} | shares


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_nonfinite_step_is_a_warning_of_the_last_rank_and_a_message_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, rank: str
) -> None:
    """Perhaps only some ranks have found it."""
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "1" if rank == "0" else "4")
    monkeypatch.setattr("time.sleep", lambda _: None)
    log, _, _ = make_log(monkeypatch, tmp_path)
    in_step_7 = argparse.Namespace(curr_iteration=6, debug=False)
    for error in (SystemExit(0), SystemExit(3), RuntimeError("out of memory")):
        with pytest.raises(type(error)) as other, report_nonfinite_exit(log, in_step_7):
            raise error
        assert other.value is error
    with pytest.raises(SystemExit) as end, report_nonfinite_exit(log, in_step_7):
        raise RuntimeError("Rank 0, iteration 7: Unexpected result nan (message='found NaN in local grad norm')")
    assert end.value.code == 1
    assert ("rank 1: the gradients of step 7 are NaN/Inf" in capsys.readouterr().err) == (rank == "1")
    path = tmp_path / "metrics.jsonl"
    actual = read_run_metrics(path).warnings if path.exists() else []
    assert [(record["iteration"], record["kind"]) for record in actual] == [(7, "not_a_number")] * (rank == "0")


def test_a_folder_in_the_place_of_the_metrics_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        open_metrics(tmp_path / "metrics.jsonl", before_iteration=1)
