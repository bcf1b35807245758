"""The .lang format: one language bit per token, next to Megatron's .bin/.idx; 1 = original-language token.

Only this module defines the format (docs/data-format.md describes it byte by byte). A 64-byte little-endian header is
followed by the bits, eight to a byte: token i is bit i % 8, counted from the least significant, of byte i // 8.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moelpr.base.errors import UserError
from moelpr.data.corpus_index import REBUILD

try:
    from moelpr.data import _language_bits
except ImportError:  # it was installed without a compiler
    from moelpr.data import language_bits_numpy as _language_bits  # type: ignore[no-redef]

MAGIC = b"MOELPRLB"
VERSION = 1
# Magic, version, CRC-32 of the payload, tokens, original-language tokens, 28 zero bytes, CRC-32 of all these.
_FIELDS = struct.Struct("<8sIIQQ28x")
_HEADER_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _HEADER_CHECKSUM.size

_BUFFER_TOKENS = 8 * (1 << 20)
_RUN_TOKENS = 1 << 20


def _header(payload_checksum: int, num_tokens: int, num_original: int) -> bytes:
    fields = _FIELDS.pack(MAGIC, VERSION, payload_checksum, num_tokens, num_original)
    return fields + _HEADER_CHECKSUM.pack(zlib.crc32(fields))


def payload_bytes(num_tokens: int) -> int:
    """Return the number of bytes for `num_tokens` bits."""
    return (num_tokens + 7) // 8


class LanguageBitsWriter:
    """Writes a .lang file of any length in pieces, with 2 MiB of memory.

    `finalize` writes the header; until then it is zero and readers reject the file. Used as a context manager, it
    closes the file without finalizing it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self.num_original = 0
        self._checksum = 0
        self._buffer = np.zeros(payload_bytes(_BUFFER_TOKENS), np.uint8)
        self._buffered = 0  # tokens in the buffer
        self._file = open(self.path, "wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, bits: NDArray[np.uint8] | NDArray[np.bool_]) -> None:
        """Append one bit per token.

        Args:
            bits: [tokens], uint8 (0 or 1) or bool; 1 = original-language token.

        Raises:
            ValueError: Wrong dtype, more than one dimension, or a value other than 0 and 1.
        """
        if bits.ndim != 1 or bits.dtype not in (np.uint8, np.bool_):
            raise ValueError(f"language bits must be uint8 or bool [tokens], got {bits.dtype} of shape {bits.shape}")
        flags = np.ascontiguousarray(bits).view(np.uint8)
        done = 0
        while done < len(flags):
            piece = flags[done : done + _BUFFER_TOKENS - self._buffered]
            self.num_original += _language_bits.pack_into(self._buffer, self._buffered, piece)
            self._buffered += len(piece)
            self.num_tokens += len(piece)
            if self._buffered == _BUFFER_TOKENS:
                self._flush()
            done += len(piece)

    def append_runs(self, runs: NDArray[np.int64]) -> None:
        """Append runs of tokens with one bit, int64 [runs]: 2 × tokens of the run + its bit."""
        bits, stops = (runs & 1).astype(np.uint8), np.cumsum(runs >> 1)
        for start in range(0, int(stops.max(initial=0)), _RUN_TOKENS):
            self.append(np.repeat(bits, np.diff(np.clip(stops, start, start + _RUN_TOKENS), prepend=start)))

    def finalize(self) -> None:
        """Write the rest and the header, and close the file, which is now complete."""
        self._flush()
        self._file.seek(0)
        self._file.write(_header(self._checksum, self.num_tokens, self.num_original))
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _flush(self) -> None:
        # Called with a full buffer or by finalize, so only the last byte of the file can be partial.
        full = self._buffer[: payload_bytes(self._buffered)]
        self._checksum = zlib.crc32(full, self._checksum)
        self._file.write(full)
        full[:] = 0
        self._buffered = 0


class LanguageBits:
    """A memory-mapped .lang file. Opening it checks the header and the file size; `verify` reads everything.

    It is pickled as its path, so that the workers of a data loader open the file themselves.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._read_header(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size)
                # A plain array, because np.memmap runs Python code at every slice.
                payload = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise UserError(f"{self.path} can't be opened ({error.strerror}); {REBUILD}") from error
        self._payload = payload[HEADER_BYTES:]

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def slice(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bits of tokens [start, stop): uint8 [stop - start], 1 = original-language token.

        Raises:
            IndexError: Unless 0 <= start <= stop <= num_tokens.
        """
        self._check_range(start, stop)
        first = start // 8
        bits = np.unpackbits(self._payload[first : payload_bytes(stop)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first]

    def of_sample(self, edges: list[int], ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], int]:
        """Return the bits of a training sample, uint8 [tokens], and its largest token ID, computed in one pass.

        Args:
            edges: Start and stop of every range of tokens that the sample was read from, flattened.
            ids: The sample's token IDs [tokens]; those after the last range are padding, whose bits are 0.

        Raises:
            IndexError: A range is outside the file, or the ranges contain more tokens than the sample.
        """
        return _language_bits.tag(self._payload, edges, ids)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the bits of single tokens: uint8 of the same shape as `positions`.

        Raises:
            IndexError: A position is outside the file.
        """
        if len(positions):
            self._check_range(int(positions.min()), int(positions.max()) + 1)
        return self._payload[positions >> 3] >> (positions & 7).astype(np.uint8) & 1

    def count(self, start: int, stop: int) -> int:
        """Return the number of original-language tokens among tokens [start, stop).

        Raises:
            IndexError: Unless 0 <= start <= stop <= num_tokens.
        """
        self._check_range(start, stop)
        return _language_bits.count_ones(self._payload, start, stop)

    def verify(self) -> None:
        """Read the whole file and compare it with its header.

        Raises:
            UserError: The checksum or the count differs, or bits after the last token are not zero.
        """
        checksum = zlib.crc32(self._payload)
        if checksum != self._checksum:
            raise UserError(
                f"{self.path} is damaged: its checksum is {checksum:08x}, not {self._checksum:08x}; {REBUILD}"
            )
        original = self.count(0, self.num_tokens)
        if original != self.num_original:
            raise UserError(
                f"{self.path} is damaged: it contains {original:,} original-language tokens, not "
                f"{self.num_original:,}; {REBUILD}"
            )
        if _language_bits.count_ones(self._payload, self.num_tokens, 8 * len(self._payload)):
            raise UserError(f"{self.path} is damaged: bits are set after its last token; {REBUILD}")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are outside {self.path}, which contains {self.num_tokens}")

    def _read_header(self, header: bytes, file_bytes: int) -> None:
        if len(header) < HEADER_BYTES or not any(header):
            raise UserError(f"{self.path} is not a complete .lang file; {REBUILD}")
        magic, version, *fields = _FIELDS.unpack_from(header)
        if magic != MAGIC:
            raise UserError(f"{self.path} is not a .lang file: it starts with {magic!r}, not {MAGIC!r}; {REBUILD}")
        if version != VERSION:
            raise UserError(
                f"{self.path} has version {version} of the .lang format, but only {VERSION} is supported; {REBUILD}"
            )
        if _header(*fields) != header:
            raise UserError(f"{self.path} is damaged: its header does not match its own checksum; {REBUILD}")
        self._checksum, self.num_tokens, self.num_original = fields
        size = HEADER_BYTES + payload_bytes(self.num_tokens)
        if file_bytes != size:
            raise UserError(
                f"{self.path} contains {file_bytes:,} bytes, not {size:,} for {self.num_tokens:,} tokens; {REBUILD}"
            )


def language_bits_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the .lang file of a corpus prefix (Megatron's term for the path without .bin/.idx)."""
    return Path(f"{os.fspath(prefix)}.lang")


def loss_bits_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the .loss file of a corpus prefix: which tokens of its conversations count in the loss."""
    return Path(f"{os.fspath(prefix)}.loss")


def open_bits(prefix: str | os.PathLike[str], num_tokens: int) -> tuple[LanguageBits, LanguageBits | None]:
    """Open the .lang file of a corpus prefix and, of conversations, the .loss file, which has the same format.

    Raises:
        UserError: A file does not cover the `num_tokens` tokens of the .bin; wrong bits would train the wrong loss.
    """
    lang, loss = LanguageBits(language_bits_path(prefix)), loss_bits_path(prefix)
    both = lang, LanguageBits(loss) if os.path.lexists(loss) else None
    for bits in both:
        if bits is not None and bits.num_tokens != num_tokens:
            raise UserError(
                f"{bits.path} covers {bits.num_tokens:,} tokens, but {bits.path.with_suffix('.bin')} contains "
                f"{num_tokens:,}; {REBUILD}"
            )
    return both
