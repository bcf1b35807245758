"""Reading a run's metrics.jsonl, also while the run still writes it."""

import json
from pathlib import Path
from typing import Any

from moelpr.errors import UserError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record per training step, in order of `iteration`.

    A last line that is only half there is left out. A resumed run repeats the steps after its last checkpoint: the
    later record of a step counts. Raises UserError for a missing file and for any other line that is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a run that has written metrics") from error
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[int(record["iteration"])] = record
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline after it: still being written
                break
            raise UserError(f"{path}, line {number} is no record of a training step; remove the line") from error
    return [records[iteration] for iteration in sorted(records)]
