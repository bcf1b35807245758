"""Every change of a byte is noticed before the file is used, also by several ranks that share the work."""

import json
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelpr.base import checksums
from moelpr.base.checksums import FILE_NAME, FileSum, Verifier, Verify, VerifyFlag, verify_folder
from moelpr.base.errors import UserError
from moelpr.base.settings import Flags, parse
from moelpr.model.checkpoints.chain import verify_step, write_checksums
from tests.support.ranks import as_ranks

FILES = {".metadata": b"table", "metadata.json": b"{}", "__0_0.distcp": b"0123456789", "__1_0.distcp": b"experts"}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_checksums(folder)
    return folder


def verify_lazily(folder: Path, verify: Verify = Verify.FULL) -> None:
    verifier = Verifier(folder, "copy it again", verify)
    for name in FILES:
        verifier.verify(name)


def test_the_file_lists_size_and_crc32_of_every_file(step: Path) -> None:
    listed = json.loads((step / FILE_NAME).read_text())["files"]
    expected = {name: {"num_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in FILES.items()}
    assert listed == expected
    verify_folder(step, "copy it again")
    verify_lazily(step)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_flipped_bit_and_any_truncation_is_noticed(step: Path, name: str, data: st.DataObject) -> None:
    before = FILES[name]
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = before[:place] + bytes([before[place] ^ (1 << data.draw(st.integers(0, 7)))]) + before[place + 1 :]
    for content, problem in ((flipped, "checksum"), (before[:place], "truncated")):
        (step / name).write_bytes(content)
        for verify in (verify_lazily, lambda folder: verify_folder(folder, "copy it again")):
            with pytest.raises(UserError, match=f"{name} .*{problem}.*copy it again"):
                verify(step)
    (step / name).write_bytes(before)
    verify_folder(step, "copy it again")


def test_a_missing_file_and_a_folder_in_the_place_of_a_file_are_named(step: Path) -> None:
    (step / "__0_0.distcp").unlink()
    for _ in range(2):
        for verify in (verify_lazily, lambda folder: verify_folder(folder, "copy it again")):
            with pytest.raises(UserError, match="__0_0.distcp is missing or can't be read; copy it again$"):
                verify(step)
        (step / "__0_0.distcp").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["/dev/zero", "../model.py"])
def test_a_list_may_name_only_files_of_its_folder(step: Path, name: str) -> None:
    """Reading /dev/zero never ends."""
    (step / "checksums.json").write_text(
        json.dumps({"format_version": 1, "files": {name: {"num_bytes": 1, "crc32": "00000000"}}})
    )
    with pytest.raises(UserError, match=f"checksums.json: .*{name}"):
        checksums.read(step)


def test_a_step_of_an_older_version_is_noted_once_and_loaded(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step / FILE_NAME).unlink()
    (step / "__0_0.distcp").write_bytes(b"?")
    for _ in range(2):
        verify_step(step, {})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(step) in said and FILE_NAME in said
    verify_folder(step, "copy it again")  # a Hugging Face directory from elsewhere is not worth a note
    assert capsys.readouterr().err == ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(cuts=st.sets(st.integers(0, 10)), is_read=st.lists(st.booleans(), min_size=11, max_size=11))
def test_what_has_been_read_is_not_read_again(step: Path, cuts: set[int], is_read: list[bool]) -> None:
    """Bytes that were read are changed afterwards, which nobody notices; others are, and so is a damaged piece."""
    data = FILES["__0_0.distcp"]
    parts = [*pairwise([0, *sorted(cuts - {0, 10}), 10])]
    pieces = {(a, b - a, zlib.crc32(data[a:b])) for a, b in parts if is_read[a]}
    now = bytearray(data)
    for start, length, _ in pieces:
        now[start : start + length] = bytes(length)
    (step / "__0_0.distcp").write_bytes(now)
    verify_step(step, {"__0_0.distcp": pieces})
    for start, length, crc32 in pieces:
        for other in (
            {(start, length, crc32 ^ 0x5A5A5A5A)},
            {(start, length, crc32), (start, length, crc32 ^ 0x5A5A5A5A)},
        ):
            with pytest.raises(UserError, match="__0_0.distcp is damaged"):
                verify_step(step, {"__0_0.distcp": pieces - {(start, length, crc32)} | other})
    (step / "__0_0.distcp").write_bytes(data)


class Reads(Flags):
    verify: VerifyFlag = Verify.FULL  # do not compare


def test_no_verify_trusts_every_file(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse(Reads, words).verify for words in ([], ["--no-verify"])] == [Verify.FULL, Verify.NONE]
    (step / "__0_0.distcp").write_bytes(b"?")
    verify_step(step, {}, Verify.NONE)
    verify_lazily(step, Verify.NONE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_work(step: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Each hashes what it wrote, and verifies its share."""
    alone = (step / FILE_NAME).read_bytes()
    (step / FILE_NAME).unlink()
    read: list[str] = []
    of = FileSum.of
    monkeypatch.setattr(FileSum, "of", lambda path, *others: read.append(path.name) or of(path, *others))
    as_ranks(monkeypatch, world, lambda: write_checksums(step))
    assert (step / FILE_NAME).read_bytes() == alone
    as_ranks(monkeypatch, world, lambda: verify_folder(step, "copy it again"))
    assert sorted(read) == sorted([*FILES, *FILES])
    (step / "__1_0.distcp").write_bytes(b"experts!")

    def fails() -> str:
        with pytest.raises(UserError, match="__1_0.distcp is damaged") as raised:
            verify_folder(step, "copy it again")
        return str(raised.value)

    assert len(set(as_ranks(monkeypatch, world, fails))) == 1
