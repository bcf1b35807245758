"""One run per folder: two would write the same steps, and each would load the other's."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from torch.distributed import TCPStore

from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE, locked, remove_temporaries
from moelpr.base.ranks import is_first_rank
from moelpr.base.run_folder import saved_step
from moelpr.train.arguments.settings import RunSettings

# Rank 0 may read its corpora first (--verify-corpus full). If it ends, the launcher ends the others.
_PATIENCE = timedelta(days=1)


@contextmanager
def run_lock(settings: RunSettings) -> Iterator[None]:
    """Rank 0 holds the lock of --save; UserError if another run does, or has saved since settings were checked."""
    if (save := settings.save) is None:
        yield
        return
    with ExitStack() as stack:
        refusal = ""
        if is_first_rank():
            try:
                save.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(save / LOCK_FILE, f"--save {save}"))
                if saved_step(save) != settings.start.saved_step:
                    raise UserError(
                        f"another run has just saved a step in --save {save}; run the command again to resume it"
                    )
                remove_temporaries(save)
            except UserError as error:
                refusal = str(error)
        if refusal := _word_of_rank_0(refusal):
            raise UserError(refusal)
        yield


def _word_of_rank_0(word: str) -> str:
    """Return rank 0's word on every rank: otherwise the others would wait for it, on other nodes for ten minutes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return word  # no torchrun, so there is no store before Megatron makes one
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    key = f"moelpr/run_lock/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if is_first_rank():
        store.set(key, word)
    return store.get(key).decode()
