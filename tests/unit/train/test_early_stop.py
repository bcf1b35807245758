"""The losses that end a run: those of its validation passes, weighted as the training text."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelpr.base.run_folder import BestStep
from moelpr.data.manifest import LanguageCount
from moelpr.train.early_stop import EarlyStop, language_weights
from tests.support.manifests import write_manifest


def corpus(prefix: Path, **tokens: int) -> str:
    counts = {name: LanguageCount("expanded", 1, number, number) for name, number in tokens.items()}
    write_manifest(prefix, sum(tokens.values()), **counts)
    return str(prefix)


def early_stop(save: Path, losses: Mapping[int, float | None], resumed_from: int = 99, **settings: Any) -> EarlyStop:
    """The state of a run of ten steps and a patience of two, with a metrics.jsonl."""
    events = (
        {"iteration": step, "event": "validation", "languages": {"el": {"lm_loss": loss}}}
        for step, loss in losses.items()
    )
    (save / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events) + '{"event": "valida')
    start = SimpleNamespace(is_resumed=True, selected_step=None, saved_step=resumed_from)
    values = {"save": save, "last_step": 10, "data_path": (), "validation_data": {"el": "el"}, "start": start}
    args = SimpleNamespace(early_stop_patience=200, seq_length=10)
    run: Any = SimpleNamespace(args=args, global_batch_size=10, save_retain_interval=None)
    actual: Any = SimpleNamespace(**values | settings)
    return EarlyStop(run, actual)


def test_languages_weigh_as_much_as_the_training_text_has_of_them(tmp_path: Path) -> None:
    new = corpus(tmp_path / "new", el=30, hu=10)
    old = corpus(tmp_path / "old", en=40, el=40)
    assert language_weights(["0.8", new, "0.2", old], ["el", "hu", "fi"]) == pytest.approx(
        {"el": 0.8 * 3 / 4 + 0.2 / 2, "hu": 0.8 / 4, "fi": 0.0}
    )
    assert language_weights([new, old], ["el", "en"]) == {"el": 70, "en": 40}
    assert language_weights([old], ["fi", "hu"]) == {"fi": 1, "hu": 1}


def test_a_run_is_over_when_the_loss_has_not_fallen_for_the_patience_and_resumes_with_its_passes(tmp_path) -> None:
    losses = {0: 1.0, 2: 3.0, 4: 2.0, 5: 2.0, 6: 2.1}
    assert [early_stop(tmp_path, losses, step).is_over for step in (0, 2, 4, 5, 6)] == [False] * 4 + [True]
    assert early_stop(tmp_path, losses).best() == 4


def test_a_loss_that_is_no_number_is_never_the_best_and_ends_no_run(tmp_path: Path) -> None:
    stop = early_stop(tmp_path, {2: None, 4: None})
    assert (stop.losses, stop.best(), stop.is_over) == ({2: math.inf, 4: math.inf}, 0, False)


def test_a_pass_without_one_of_the_languages_does_not_count(tmp_path: Path) -> None:
    stop = early_stop(tmp_path, {2: 3.0}, validation_data={"el": "", "hu": ""})
    assert stop.losses == {}
    assert stop.loss({"el": {"lm_loss": 1.0}, "hu": {"lm_loss": 2.0}}) == 1.5


def test_the_record_ends_a_run_unless_it_is_to_train_for_longer(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    losses = {2: 1.0, 3: 1.5, 4: 2.0, 6: 2.1}
    assert early_stop(tmp_path, losses).end() is None  # no step is saved
    for step in (1, 4, 5, 6):
        (tmp_path / f"iter_{step:07d}").mkdir()
    assert early_stop(tmp_path, losses).end() == BestStep(4, 2.0, 6, 10)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert early_stop(tmp_path, {4: 2.0}, 4).is_over
    assert not early_stop(tmp_path, {4: 2.0}, 4, last_step=20).is_over


def test_of_the_saved_steps_the_best_the_latest_and_each_tenth_stay(tmp_path: Path) -> None:
    for step in range(1, 14):
        (tmp_path / f"iter_{step:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    (tmp_path / "iter_0000003").rmdir()
    stop = early_stop(tmp_path, {3: 1.5, 4: 2.0, 6: 2.1, 13: 1.0})
    stop.retain_interval = 10
    stop.remove_steps()
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("iter_*")) == [4, 10, 12, 13]
