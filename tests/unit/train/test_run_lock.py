import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from moelpr.base.errors import UserError
from moelpr.train.run_lock import run_lock


def run_in(save: Path | None, saved_step: int | None = None) -> Any:
    return SimpleNamespace(save=save, start=SimpleNamespace(saved_step=saved_step))


def test_a_second_run_in_a_folder_is_rejected_until_the_first_has_ended(tmp_path: Path) -> None:
    with run_lock(run_in(tmp_path / "run")), run_lock(run_in(tmp_path / "other")), run_lock(run_in(None)):
        with pytest.raises(UserError, match=f"--save {tmp_path}/run;"), run_lock(run_in(tmp_path / "run")):
            pass
    with run_lock(run_in(tmp_path / "run")):
        pass


def test_a_run_that_read_the_folder_before_another_saved_to_it_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with run_lock(run_in(tmp_path, saved_step=10)):
        pass
    for before in (None, 5):
        with pytest.raises(UserError, match=f"--save {tmp_path}.*again"), run_lock(run_in(tmp_path, before)):
            pass


@pytest.mark.parametrize("is_taken", [True, False])
def test_the_other_ranks_do_what_rank_0_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool) -> None:
    """Rank 0 is another process; the store is torchrun's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = "TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT=0 MASTER_ADDR=127.0.0.1 RANK=0 "
    variables += f"MASTER_PORT={store.port} PYTHONPATH={Path(__file__).parents[3]}"
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    code = "import sys; from pathlib import Path; from types import SimpleNamespace as Settings\n"
    code += "from moelpr.train.run_lock import run_lock\n"
    code += "with run_lock(Settings(save=Path(sys.argv[1]), start=Settings(saved_step=None))): input()"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10" if is_taken else "release")
    rank_0 = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    monkeypatch.setenv("RANK", "1")
    try:
        if is_taken:
            with pytest.raises(UserError, match=f"--save {tmp_path}"), run_lock(run_in(tmp_path)):
                pass
        else:
            with run_lock(run_in(tmp_path)):
                pass
    finally:
        rank_0.kill()
        rank_0.communicate()
