"""The least time tokenizing with Hugging Face can take: `encode_batch_fast` on all cores, of texts in memory.

    python benchmarks/baselines/encode_batch.py TOKENIZER FILE...

Prints the wall time and the CPU time of these calls in seconds, without reading, parsing or keeping anything.
"""

import json
import sys
import time
from itertools import batched

from tokenizers import Tokenizer


def main(tokenizer_json: str, *paths: str) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_json)
    seconds = cpu_seconds = 0.0
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for lines in batched(file, 1000):
                texts = [json.loads(line)["text"] for line in lines]
                started, cpu_started = time.perf_counter(), time.process_time()
                tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                seconds += time.perf_counter() - started
                cpu_seconds += time.process_time() - cpu_started
    print(seconds, cpu_seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
