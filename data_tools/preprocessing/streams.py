"""Files as streams of bytes, decompressed on the way."""

import bz2
import errno
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO, cast

from data_tools.preprocessing.sources import Form, Source
from moelpr.errors import UserError


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A source's lines as bytes, and a function that tells how many of the file's own bytes are used so far."""
    if source.form is Form.STREAM:
        yield sys.stdin.buffer, lambda: 0
        return
    with ExitStack() as stack:
        raw = stack.enter_context(open(source.path, "rb"))
        stream: object = raw
        if source.form is Form.GZIP:
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif source.form is Form.BZIP2:
            stream = stack.enter_context(bz2.BZ2File(raw))
        elif source.form is Form.XZ:
            stream = stack.enter_context(lzma.LZMAFile(raw))
        elif source.form is Form.ZSTD:
            import pyarrow  # Python's own zstd comes with 3.14

            native = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
            stream = io.BufferedReader(native, 1 << 20)
        yield cast(BinaryIO, stream), raw.tell


@contextmanager
def damage_told(source: Source) -> Iterator[None]:
    """Say of a file that can't be read to its end which one it is, in one sentence.

    A damaged archive always stops the run: how many documents it has lost, nobody knows.
    """
    try:
        yield
    except UserError:
        raise
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are OSError or ValueError
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the input {source.path} ({source.form}) is damaged or cut short ({reason}); fetch it again, or leave it "
            f"out"
        ) from error
