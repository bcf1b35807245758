"""A dry run of the runs of benchmarks.trainer_steps: memory, kernels and waits of a step.

    python -m benchmarks.dry_steps FOLDER GPU RANKS

reads FOLDER/runs.json and writes FOLDER/dry.json, with the last rank's numbers as trainer_steps has them. GPU is a name
that the planner knows.
"""

import json
import sys
from pathlib import Path

from moelpr.train.check.whole_run import check, prepare


def main() -> None:
    folder, gpu, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    prepare(gpu, ranks)
    results = {}
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        last = check(arguments, 1, ranks).runs[-1]
        results[name] = {
            "memory_gib": last.peak_bytes / 2**30,
            "kernels": last.counts.kernels.total(),
            "waits": last.counts.waits.total(),
        }
    (folder / "dry.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
