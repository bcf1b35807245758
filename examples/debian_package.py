"""Files of a Debian package, without installing it."""

import hashlib
import io
import lzma
import tarfile
from contextlib import suppress
from pathlib import Path

from moelpr.base.errors import UserError


def read_deb(path: Path, folder: str, suffix: str | tuple[str, ...] = "") -> dict[str, bytes]:
    """Name -> content of the files of a Debian package under `folder`, sorted.

    The package is an ar archive, one of whose members is a tar archive of the files.

    Raises:
        UserError: it is not such a package.
    """
    with suppress(ValueError, EOFError, tarfile.TarError, lzma.LZMAError), open(path, "rb") as package:
        header = package.read(60) if package.read(8) == b"!<arch>\n" else b""
        while header:
            name, size = header[:16].decode().strip(), int(header[48:58])
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(package.read(size))) as archive:
                    files = {x.name.removeprefix("./"): x for x in archive if x.isfile()}
                    names = sorted(name for name in files if name.startswith(folder) and name.endswith(suffix))
                    return {name: file.read() for name in names if (file := archive.extractfile(files[name]))}
            package.seek(size + size % 2, io.SEEK_CUR)
            header = package.read(60)
    raise UserError(f"{path} is not a Debian package; remove it and run it again")


def digest_of(path: Path, folder: str) -> str:
    """SHA-256 over the names, sizes and contents of a package's files under `folder`.

    Revisions of a package differ as files, but not in this if upstream's files are the same.
    """
    digest = hashlib.sha256()
    for name, content in read_deb(path, folder).items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
