"""What is said when Megatron ends a run because a step's loss or gradient is not a number."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION, EXIT_CODE_RESUME_TO_DISAMBIGUATE

from moelpr.training.early_warnings import Warning
from moelpr.training.metrics import StepLog

_CODES = (EXIT_CODE_FAILED_ON_RESULT_VALIDATION, EXIT_CODE_RESUME_TO_DISAMBIGUATE)


@contextmanager
def is_said(args: argparse.Namespace, step_log: StepLog) -> Iterator[None]:
    """Megatron runs such a step again and then leaves its loop by sys.exit with a code of its own; ours is 1.

    With its checks of results switched off (--rerun-mode disabled) it raises a RuntimeError instead.
    """
    try:
        yield
    except SystemExit as end:
        if end.code not in _CODES:
            raise
        _end(args, step_log)
    except RuntimeError as error:
        if "Unexpected result" not in str(error) or args.debug:
            raise
        _end(args, step_log)


def _end(args: argparse.Namespace, step_log: StepLog) -> None:
    step = args.curr_iteration + 1
    message = (
        f"the gradients of step {step} are not finite, also when it is run again, so it was not taken and the run "
        "ends; lower --lr, raise --lr-warmup-iters, or look at the data of this step"
    )
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    if rank == last:
        step_log.run_log.warn(step, [Warning("not_a_number", message)])
    if rank == 0 and last != 0:
        print(f"moelpr: error: {message}", file=sys.stderr, flush=True)
    if rank != last:
        time.sleep(5)  # the launcher ends all ranks once one has failed; the last one is still writing
    sys.exit(1)
