"""The decompressed bytes of an input file."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

from moelpr.base.errors import DISK_FULL, UserError
from moelpr.data.text import remote
from moelpr.data.text.sources import Form, Source

BLOCK_BYTES = 1 << 16


def _open_zstd(raw: BinaryIO) -> Any:
    import pyarrow  # Python's own zstd comes with 3.14

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")


class _Streams(io.RawIOBase):
    """Bytes of a file of one or more compressed streams. `bz2.open` and `lzma.open` ignore all after a damaged start.

    Args:
        raw: The file.
        new: Makes a decompressor for one stream.
        padding: Bytes that may stand between streams.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any], padding: bytes) -> None:
        self._raw, self._new, self._padding = raw, new, padding
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            piece = b""
            if self._stream.eof:
                block, padded = self._stream.unused_data, 0
                while True:
                    piece = block.lstrip(self._padding)
                    padded += len(block) - len(piece)
                    if piece or not (block := self._raw.read(BLOCK_BYTES)):
                        break
                if padded % 4:
                    raise EOFError("what is between its streams is not of four bytes each")
                if not piece:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (piece := self._raw.read(BLOCK_BYTES)):
                raise EOFError("it ends within a stream")
            content = self._stream.decompress(piece, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)


_OPENERS: dict[Form, Callable[[BinaryIO], Any]] = {
    Form.LINES: nullcontext,
    Form.GZIP: gzip.open,
    Form.BZIP2: lambda raw: io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor, b""), BLOCK_BYTES),
    Form.XZ: lambda raw: io.BufferedReader(_Streams(raw, lzma.LZMADecompressor, b"\0"), BLOCK_BYTES),
    Form.ZSTD: lambda raw: io.BufferedReader(_open_zstd(raw), BLOCK_BYTES),
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
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are OSError or ValueError
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the input {source.path} ({source.form}) is damaged or truncated ({reason}); copy it again, or omit it"
        ) from error
