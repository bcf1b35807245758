from pathlib import Path

from moelpr.train.arguments.settings import RunSettings


def test_where_a_run_starts_is_resolved_once(gathered, upcycled: str, make_checkpoint) -> None:
    new = RunSettings.of(gathered("--save", f"{upcycled}-new")).start
    assert (new.checkpoint, new.step_folder) == (Path(upcycled), Path(upcycled) / "release")
    assert not new.is_resumed and new.saved_step is None
    run = Path(make_checkpoint("run", stage="stage1"))
    (run / "release").rename(run / "iter_0000001")
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    resumed = RunSettings.of(gathered("--save", str(run))).start
    assert (resumed.checkpoint, resumed.step_folder) == (run, run / "iter_0000001")
    assert resumed.is_resumed and (resumed.saved_step, resumed.selected_step) == (1, None)
    assert resumed.pretrained == Path(upcycled)
