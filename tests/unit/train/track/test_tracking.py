import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.train.track import tracking
from moelpr.train.track.trackers import TRACKERS, Tracker, public_settings, redact
from moelpr.train.track.tracking import TrackedRun, Tracking, tracked_folders, values_of


class Memory(Tracker):
    """A tracker whose runs outlive it; `failures` of its next calls fail."""

    name, package = "memory", "json"
    runs: dict[str, list[tuple[str, int, float]]] = {}
    failures = 0

    def start(self) -> Mapping[str, int]:
        self._rows = Memory.runs.setdefault(self.run, [])
        self._answer()
        return defaultdict(lambda: -1, {key: step for key, step, _ in self._rows})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._answer()
        self._rows += [(key, step, value) for key, value in values.items()]

    def settings(self, stage: str, values: Mapping[str, Any]) -> None: ...

    def files(self, folder: Path) -> None: ...

    def finish(self) -> None: ...

    def _answer(self) -> None:
        if Memory.failures:
            Memory.failures -= 1
            raise ConnectionError("no route to host-1.example")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "mlflow_experiment", Memory)
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setattr(Memory, "failures", 0)
    monkeypatch.setattr(tracking, "_RETRY_S", 0.01)


def start(save: Path, before: Path | None = None, steps: int = 0, shared: bool = True, kept: int = 0) -> Tracking:
    """As the trainer, which removes the steps after its checkpoint's, `kept`, before it starts to send."""
    save.mkdir(parents=True, exist_ok=True)
    file = str(save.parent / "tracker.json") if shared else None
    flags = dict.fromkeys(TRACKERS) | {"mlflow_experiment": "p", "tracker_run": file}
    path = save / "metrics.jsonl"
    is_new = not path.exists()
    path.touch()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    return Tracking(argparse.Namespace(**flags), save, before, steps, is_new=is_new)


def train(save: Path, tracking: Tracking, first: int, last: int) -> None:
    """Steps of a training that starts after its step `first`."""
    for step in range(first + 1, last + 1):
        record = {"iteration": step, "stage": save.name, "lm_loss": step + len(save.name) / 8}
        with (save / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        tracking.add(step, values_of(record))


def trained(save: Path, before: Path | None, steps: int, last: int, **options: bool) -> None:
    """A whole training of `last` steps, after `steps` of the stage before."""
    one = start(save, before, steps, **options)
    train(save, one, 0, last)
    one.close()


def losses(run: str) -> list[tuple[int, float]]:
    return [(step, value) for key, step, value in Memory.runs[run] if key == "lm loss"]


def wait_until_sent(tracking: Tracking) -> None:
    while any(not sender.items.empty() for sender in tracking._senders):
        time.sleep(0.001)


# Steps until the kill, steps until the last checkpoint before it, and how many calls of the tracker fail in between.
ATTEMPT = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.booleans())


@settings(max_examples=40, deadline=None)
@given(attempts=st.lists(ATTEMPT, max_size=4))
def test_every_step_is_there_once_in_order_over_kills_failures_and_stages(
    tmp_path_factory: pytest.TempPathFactory, attempts: list
) -> None:
    folder = tmp_path_factory.mktemp("run")
    Memory.runs.clear()
    before, steps = None, 0
    for stage in ("stage1", "stage22"):
        at = 0
        for more, lost, failures, is_sent in attempts:
            Memory.failures = failures
            killed = start(folder / stage, before, steps, kept=at)
            train(folder / stage, killed, at, min(at + more, 6))
            if is_sent:
                wait_until_sent(killed)
            for sender in killed._senders:  # a kill: nothing more is sent
                sender._tracker.log = lambda *_: None  # type: ignore[method-assign]
                sender.close()
            at = max(0, min(at + more, 6) - lost)
        Memory.failures = 0
        last = start(folder / stage, before, steps, kept=at)
        train(folder / stage, last, at, 6)
        last.close()
        before, steps = folder / stage, 6
    (run,) = Memory.runs
    expected = [
        (6 * place + step, step + len(name) / 8)
        for place, name in enumerate(("stage1", "stage22"))
        for step in range(1, 7)
    ]
    assert losses(run) == expected


def test_an_unreachable_tracker_is_one_warning_and_gets_all_at_the_next_start(tmp_path: Path, capsys) -> None:
    Memory.failures = 10**9
    away = start(tmp_path / "stage1")
    train(tmp_path / "stage1", away, 0, 5)
    away.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("moelpr: warning: memory gets no metrics (no route to")
    Memory.failures = 0
    start(tmp_path / "stage1", kept=5).close()
    assert [step for step, _ in losses(*Memory.runs)] == [1, 2, 3, 4, 5]


def test_runs_without_a_shared_record_are_their_own_with_steps_that_go_on(tmp_path: Path) -> None:
    trained(tmp_path / "stage1", None, 0, last=4, shared=False)
    trained(tmp_path / "stage2", tmp_path / "stage1", 4, last=4, shared=False)
    assert [[step for step, _ in losses(run)] for run in Memory.runs] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_stage_that_is_trained_again_gets_another_run_with_the_stages_before(tmp_path: Path) -> None:
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    trained(stage1, None, 0, last=3)
    trained(stage2, stage1, 3, last=3)
    (stage2 / "metrics.jsonl").unlink()
    trained(stage2, stage1, 3, last=2)
    first, second = Memory.runs
    assert [step for step, _ in losses(first)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in losses(second)] == [1, 2, 3, 4, 5]


def test_runs_that_were_never_tracked_are_sent_in_their_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"iteration": 1, "lm_loss": 2.0}\n{"iteration": 2, "lm_loss": 1.0}\n'
        )
    run = tracked_folders([tmp_path / "one", tmp_path / "two"], tmp_path / "tracker.json")
    assert run.starts == {"one": 0, "two": 2} == TrackedRun.read(tmp_path).starts
    assert [step for step, _ in run.values(tmp_path, defaultdict(lambda: -1))] == [1, 2, 3, 4]


def test_credentials_and_hosts_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_API_KEY", "k-123456")
    monkeypatch.setenv("SITE_URL", "https://me:word@inner.example:8080/api")
    text = redact("s3://me:word@bucket k-123456 at inner.example, outer.example, ak-1234567")
    assert text == "s3://***@bucket *** at ***, outer.example, ak-1234567"
    kept = {"lr": 1.0, "tokenizer_model": "hf", "train_tokens": 5}
    private = {"master_addr": "a", "data_path": ["1", "k-123456"]}
    assert public_settings(kept | private) == kept | {"data_path": ["1", "***"]}
