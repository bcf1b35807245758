"""The decompressed bytes of an input file."""

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, BinaryIO

from moelpr.base.errors import DISK_FULL, UserError
from moelpr.data.text import remote
from moelpr.data.text.sources import Form, Source

BLOCK_BYTES = 1 << 16


def _unpacked(raw: BinaryIO, codec: str) -> BinaryIO:
    import pyarrow  # Python's own zstd comes with 3.14; `bz2.open` ignores all after a damaged start

    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), codec)
    return io.BufferedReader(stream, BLOCK_BYTES)


_OPENERS: dict[Form, Callable[[BinaryIO], Any]] = {
    Form.LINES: nullcontext,
    Form.GZIP: gzip.open,
    Form.BZIP2: partial(_unpacked, codec="bz2"),
    Form.ZSTD: partial(_unpacked, codec="zstd"),
}


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Yield a source's decompressed lines, and a function that returns how many bytes of the file have been read."""
    if source.form is Form.STREAM:
        yield sys.stdin.buffer, lambda: 0
        return
    with source.open() as raw, _OPENERS[source.form](raw) as stream:
        yield stream, raw.tell


@contextmanager
def name_damaged(source: Source) -> Iterator[None]:
    """Report which file is damaged.

    A damaged archive always stops the job: it is unknown how many documents it has lost.
    """
    if source.uri and not source.is_local:
        with remote.explained(source.uri):
            yield
        return
    try:
        yield
    except UserError:
        raise
    except (EOFError, OSError, ValueError, zlib.error) as error:  # pyarrow's are OSError or ValueError
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the input {source.path} ({source.form}) is damaged or truncated ({reason}); copy it again, or omit it"
        ) from error
