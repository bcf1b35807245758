"""Downloads with the real pip from a folder, and with a stand-in for apt-get; no network."""

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples import downloads
from examples.debian_package import digest_of
from examples.downloads import Source, fetch_all, read_sources
from moelpr.base.errors import MachineError, UserError
from tests.support.debian_packages import write_deb
from tests.support.programs import put_on_path

PAGES = {"usr/share/pages/a.html": b"first", "usr/share/pages/b.html": b"second"}
CHANGES = "usr/share/doc/changes"  # a file that nobody reads


def source_of(content: bytes, registry: str, name: str, package: str, version: str) -> Source:
    digest = hashlib.sha256(content).hexdigest()
    return Source(package, registry, version, name, digest, len(content), "help", "CC0-1.0", "a test")


def package_of(folder: Path, files: dict[str, bytes]) -> bytes:
    write_deb(folder / "written.deb", files)
    return (folder / "written.deb").read_bytes()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A wheel in the only folder where pip may look."""
    name = "texts-1.0-py3-none-any.whl"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / name, "w") as archive:
        metadata = "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\nRequires-Python: >=9\n"  # read, not installed
        archive.writestr("texts-1.0.dist-info/METADATA", metadata)
        archive.writestr("texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("texts-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return source_of((tmp_path / "index" / name).read_bytes(), "pypi", name, "texts", "1.0")


@pytest.fixture
def deb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A package that a stand-in for apt-get copies; it writes its arguments into the file `calls`."""
    name = "manual_1%3a2.0-1_all.deb"
    (tmp_path / name).write_bytes(package_of(tmp_path, {**PAGES, CHANGES: b"1"}))
    script = f"echo $@ >>{tmp_path}/calls\ncp {tmp_path}/{name} . && exit ${{APT_CODE:-0}}"
    put_on_path(monkeypatch, tmp_path / "bin", {"apt-get": script})
    source = source_of((tmp_path / name).read_bytes(), "debian", "manual.deb", "manual", "1:2.0-1*")
    folder = "usr/share/pages/"
    return replace(source, folder=folder, sha256=digest_of(tmp_path / name, folder))


def change(tmp_path: Path, files: dict[str, bytes]) -> bytes:
    """Replace the package that the registry has."""
    content = package_of(tmp_path, files)
    next(tmp_path.glob("manual_*.deb")).write_bytes(content)
    return content


def test_packages_of_both_registries_come_once(wheel: Source, deb: Source, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    actual = fetch_all([wheel, deb], cache)
    assert actual == {"texts": cache / wheel.file, "manual": cache / deb.file}
    assert (tmp_path / "calls").read_text() == "download manual=1:2.0-1*\n"
    shutil.rmtree(tmp_path / "index")
    assert fetch_all([wheel, deb], cache) == actual
    assert (tmp_path / "calls").read_text().count("\n") == 1


def test_no_network_and_no_cache(wheel: Source, tmp_path: Path) -> None:
    (tmp_path / "index" / wheel.file).unlink()
    with pytest.raises(UserError, match=rf"{wheel.file} could not be downloaded .*texts==1\.0.*{tmp_path}/cache"):
        fetch_all([wheel], tmp_path / "cache")


@pytest.mark.parametrize("is_cached", [True, False])
def test_another_checksum(deb: Source, tmp_path: Path, is_cached: bool) -> None:
    cache, good = tmp_path / "cache", next(tmp_path.glob("manual_*.deb")).read_bytes()
    other = change(tmp_path, {**PAGES, "usr/share/pages/b.html": b"changed"})
    if is_cached:
        cache.mkdir()
        (cache / deb.file).write_bytes(other)
    with pytest.raises(UserError, match=f"usr/share/pages/ in .* has SHA-256 [0-9a-f]{{64}}, but {deb.sha256}"):
        fetch_all([deb], cache)
    assert not (cache / deb.file).exists()
    next(tmp_path.glob("manual_*.deb")).write_bytes(good)
    assert fetch_all([deb], cache)["manual"].read_bytes() == good


@pytest.mark.parametrize("files", [{"usr/share/pages/a.html": b"firstsecond"}, {**PAGES, "usr/share/pages/c": b""}])
def test_the_checksum_is_of_names_and_contents_of_pages(deb: Source, tmp_path: Path, files: dict[str, bytes]) -> None:
    change(tmp_path, files)
    with pytest.raises(UserError, match="is pinned"):
        fetch_all([deb], tmp_path / "cache")
    newer = change(tmp_path, {**PAGES, CHANGES: b"2"})
    assert fetch_all([deb], tmp_path / "cache")["manual"].read_bytes() == newer


@pytest.mark.parametrize("content", [b"<html>", b"!<arch>\nnot really", b"!<arch>\n" + b"data.tar".ljust(60), None])
def test_something_that_is_no_package(tmp_path: Path, deb: Source, content: bytes | None) -> None:
    whole = next(tmp_path.glob("manual_*.deb")).read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / deb.file).write_bytes(content or whole[: len(whole) // 2])
    with pytest.raises(UserError, match="manual.deb is not a Debian package"):
        fetch_all([deb], tmp_path / "cache")


def test_an_interrupted_download_starts_over(deb: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("APT_CODE", "100")
    with pytest.raises(UserError, match="could not be downloaded .*apt-get update"):
        fetch_all([deb], cache)
    # Files that a killed process leaves.
    (cache / downloads.DOWNLOAD).mkdir()
    (cache / downloads.DOWNLOAD / "half").write_bytes(b"!<a")
    assert not (cache / deb.file).exists()
    monkeypatch.delenv("APT_CODE")
    assert fetch_all([deb], cache)["manual"].exists()


def test_too_little_disk_is_said_before_the_first_download(deb, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=deb.bytes))
    with pytest.raises(MachineError, match="needs .* of disk"):
        fetch_all([deb], tmp_path / "cache")
    assert not (tmp_path / "calls").exists()


def test_every_download_is_pinned() -> None:
    for source in read_sources().values():
        assert len(source.sha256) == 64 and source.bytes > 1e6 and source.licence
        assert (source.registry == "debian") == bool(source.folder)
