"""How a run ends when the loss or the gradient of a step is NaN or Inf."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION, EXIT_CODE_RESUME_TO_DISAMBIGUATE

from moelpr.training.early_warnings import EarlyWarning
from moelpr.training.run_log import RunLog

_EXIT_CODES = (EXIT_CODE_FAILED_ON_RESULT_VALIDATION, EXIT_CODE_RESUME_TO_DISAMBIGUATE)


@contextmanager
def report_nonfinite_exit(args: argparse.Namespace, run_log: RunLog) -> Iterator[None]:
    """Log the step and its fix, and exit with code 1.

    Megatron retries such a step once, then leaves its training loop through sys.exit with exit codes of its own. With
    `--rerun-mode disabled` it raises a RuntimeError instead.
    """
    try:
        yield
        return
    except SystemExit as error:
        if error.code not in _EXIT_CODES:
            raise
    except RuntimeError as error:
        if "Unexpected result" not in str(error) or args.debug:
            raise
    step = args.curr_iteration + 1
    message = (
        f"the gradients of step {step} are NaN/Inf even after a retry; step discarded, training stopped; lower --lr, "
        "raise --lr-warmup-iters, or check the data of this step"
    )
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    if rank == last:
        run_log.warn(step, [EarlyWarning("not_a_number", message)])
    if rank == 0 and last != 0:
        print(f"moelpr: error: {message}", file=sys.stderr, flush=True)
    if rank != last:
        time.sleep(5)  # the launcher ends all ranks as soon as one has failed, but the last one is still writing
    sys.exit(1)
