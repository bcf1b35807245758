"""Tokenize JSON lines or Parquet: write <output-prefix>_<key>_document.bin and .idx for Megatron, and .lang.

The flags are those of Megatron-LM's tool of the same name, plus the language bit, which is always stated: for all input
(--language el --original-languages en,es,zh), per document (--language-key lang --original-languages en,es,zh), per
span of a document (--spans-key spans), by a registry (--dataset), or detected by py3langid (--detect-language).
With --conversations, documents are lists of messages, which the tokenizer's chat template turns into text.

Several jobs share the work with --num-shards N, each with its own --shard; moelpr data merge joins their outputs
into the bytes that a single job would have written. docs/corpora.md has examples of everything.
"""

import sys
import time

from data_tools.preprocessing.job import Job
from data_tools.preprocessing.job_spec import describe_job
from data_tools.preprocessing.settings import Settings
from data_tools.preprocessing.summary import print_summary
from moelpr.base.settings import run_script


def main(args: Settings) -> None:
    started = time.monotonic()
    spec = describe_job(args)
    for note in spec.notes:
        print(f"note: {note}", file=sys.stderr)
    with Job(spec) as job:
        job.write()
        job.commit()
    print_summary(job)
    print(f"done in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run_script(main)
