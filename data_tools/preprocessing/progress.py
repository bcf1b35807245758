"""How far a job is: a bar on a terminal, else lines in a log."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Documents, MB/s, tokens/s and the time left.

    Args:
        total_bytes: of the input files; 0: unknown, as of standard input.
        done_bytes: of these, what an earlier run has read.
        log_interval: documents between two lines of a log.
    """

    def __init__(self, total_bytes: int, done_bytes: int, log_interval: int) -> None:
        self._total_bytes = total_bytes
        self._log_interval = log_interval
        self._file_bytes = done_bytes
        self._new_file_bytes = self._documents = self._tokens = self._bytes = 0
        self._started = time.monotonic()
        is_terminal = sys.stderr.isatty()
        total = total_bytes or None
        self._bar = (
            tqdm(total=total, initial=done_bytes, unit="B", unit_scale=True, leave=False) if is_terminal else None
        )

    def advance(self, documents: int, tokens: int, num_bytes: int, file_bytes: int) -> None:
        """Count a batch: `num_bytes` of JSON, decompressed, from `file_bytes` of the file."""
        lines_before = self._documents // self._log_interval
        self._documents += documents
        self._tokens += tokens
        self._bytes += num_bytes
        self._file_bytes += file_bytes
        self._new_file_bytes += file_bytes
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        speed = f"{self._bytes / 1e6 / elapsed_s:.1f} MB/s, {self._tokens / elapsed_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._documents:,} documents, {speed}", refresh=False)
            self._bar.update(file_bytes)
        elif self._documents // self._log_interval > lines_before:
            share, left = "", ""
            if self._total_bytes:
                left_s = elapsed_s * (self._total_bytes - self._file_bytes) / max(self._new_file_bytes, 1)
                share, left = f"{self._file_bytes / self._total_bytes:6.1%}  ", f", {left_s:,.0f} s left"
            print(f"{share}{self._documents:,} documents, {speed}{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
