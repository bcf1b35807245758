"""python -m benchmarks.dry_steps FOLDER GPU RANKS: memory, kernels and waits of runs.json's runs, to dry.json."""

import json
import sys
from pathlib import Path

from moelpr.train.check.whole_run import check, prepare

if __name__ == "__main__":
    folder, gpu, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    prepare(gpu, ranks)
    results = {}
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        last = check(arguments, 1, ranks).runs[-1]
        counts = {"kernels": last.counts.kernels.total(), "waits": last.counts.waits.total()}
        results[name] = {"memory_gib": last.peak_bytes / 2**30, **counts}
    (folder / "dry.json").write_text(json.dumps(results))
