"""datatrove's own tokenizer, on a file of JSON lines.

    python benchmarks/baselines/datatrove_tokenizer.py FILE TOKENIZER OUTPUT WORKERS

It writes tokens, without language bits and a manifest.
"""

import shutil
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    file, tokenizer, output, workers = sys.argv[1:]
    out = Path(output) / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(file).parent), glob_pattern=Path(file).name),
            DocumentTokenizer(
                str(out), tokenizer_name_or_path=f"{tokenizer}/tokenizer.json", eos_token=None, shuffle_documents=False
            ),
        ],
        tasks=1,  # a file is not split
        workers=int(workers),
        logging_dir=str(out / "logs"),
    ).run()
