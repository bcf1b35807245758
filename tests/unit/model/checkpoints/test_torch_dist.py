import inspect
import itertools
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from moelpr.base.checksums import SummedFile
from moelpr.base.errors import UserError
from moelpr.base.journal import Journal
from moelpr.model.checkpoints.torch_dist import TorchDistReader, TorchDistWriter, read_metadata


def test_every_chunk_of_any_grid_is_read(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    with TorchDistWriter(tmp_path, max_file_bytes=1000) as writer:
        for a in (0, 2):
            for b in (0, 2, 4):
                writer.write("grid", whole[a : a + 2, b : b + 2], (4, 6, 5), (a, b, 0))
        writer.write("scalar", torch.tensor(3.0))
        writer.finish({})
    assert len(list(tmp_path.glob("*.distcp"))) > 1
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("grid"), whole)
    for index in range(4):
        assert torch.equal(reader.read("grid", index), whole[index])
    assert reader.read("scalar").item() == 3.0


def test_a_missing_part_of_a_stack_is_reported(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path) as writer:
        for row in (0, 2):
            writer.write("stack", torch.ones(1, 4), (3, 4), (row, 0))
        writer.finish({})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("stack", 2), torch.ones(4))
    for index in (None, 1):
        with pytest.raises(UserError, match="stack"):
            reader.read("stack", index)


def test_an_interrupted_writer_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def write(folder: Path, stop_after: int | None = None) -> int:
        num_written = 0
        folder.mkdir(exist_ok=True)
        with TorchDistWriter(folder / "step", Journal(folder, "job"), max_file_bytes=3000) as writer:
            for index in range(8):
                if num_written == stop_after:
                    return num_written
                if not writer.is_written("stack", (index, 0)):
                    writer.write("stack", torch.full((1, 500), float(index)), (8, 500), (index, 0))
                    num_written += 1
            writer.finish({})
        return num_written

    assert write(tmp_path / "unbroken") == 8
    write(tmp_path / "broken", stop_after=5)
    assert write(tmp_path / "broken") == 4  # four of the five files were complete
    for path in (tmp_path / "unbroken/step").iterdir():
        assert path.read_bytes() == (tmp_path / "broken/step" / path.name).read_bytes(), path
    assert torch.equal(TorchDistReader(tmp_path / "broken/step").read("stack")[:, 0], torch.arange(8.0))


@pytest.mark.parametrize("num_writes", [1, 2, 5])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_within_a_tensor_is_not_another_error(tmp_path, monkeypatch, num_writes, number, error) -> None:
    """torch.save raises an error of its own when it closes the archive that it could not write."""
    calls, write = itertools.count(1), SummedFile.write

    def interrupted(self: SummedFile, data: bytes) -> int:
        if next(calls) == num_writes:
            signal.raise_signal(number)
            for _ in range(1000):  # a handler runs between two instructions
                pass
        return write(self, data)

    def handler(*_: object) -> None:
        raise error

    monkeypatch.setattr(SummedFile, "write", interrupted)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(error), TorchDistWriter(tmp_path) as writer:
            writer.write("tensor", torch.ones(1000))
    finally:
        signal.signal(number, before)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000001"
    with TorchDistWriter(folder) as writer:
        writer.write("tensor", torch.ones(3))
        writer.write_object("module._extra_state", None)
        writer.finish({"iteration": 1})
    return folder


def test_metadata_has_the_entries_that_torch_reads(step: Path) -> None:
    ours, torchs = read_metadata(step), inspect.unwrap(dcp.FileSystemReader.read_metadata)(dcp.FileSystemReader(step))
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data


@pytest.mark.parametrize(
    "change", [{"size": 3}, {"size": torch.Size([3, 1])}, {"properties": None}, {"chunks": [None]}]
)
def test_an_entry_of_another_type_is_reported(step: Path, change: dict[str, object]) -> None:
    """The checkpoint has no checksums."""
    (step / "checksums.json").unlink()
    metadata = pickle.loads((step / ".metadata").read_bytes())
    vars(metadata.state_dict_metadata["tensor"]).update(change)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        TorchDistReader(step)


def test_missing_and_damaged_metadata_are_reported(step: Path) -> None:
    intact = (step / ".metadata").read_bytes()
    # The second is a flipped bit in an attribute's name, and without checksums found when the table is read.
    for content in (b"\x80\x04nonsense", intact.replace(b"offset", b"offseu")):
        (step / ".metadata").write_bytes(content)
        for read in (read_metadata, TorchDistReader):
            with pytest.raises(UserError, match="iter_0000001/.metadata is (damaged|truncated)"):
                read(step)
    (step / ".metadata").unlink()
    with pytest.raises(UserError, match="iter_0000001 .*.metadata is missing"):
        TorchDistReader(step)


@pytest.mark.parametrize(
    ("named", "state"),
    [
        (_StorageInfo, b"N}X\x06\x00\x00\x00__eq__K\x01s\x86"),
        (_StorageInfo, b"}X\x04\x00\x00\x00newxK\x01s"),
        (_get_layout, b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86"),
    ],
)
def test_a_table_of_contents_changes_no_class_or_function(step: Path, named: Any, state: bytes) -> None:
    before = dict(vars(named))
    build = f"c{named.__module__}\n{named.__name__}\n".encode() + state + b"b0"
    (step / "checksums.json").unlink()
    (step / ".metadata").write_bytes(b"\x80\x02" + build + (step / ".metadata").read_bytes()[2:])
    try:
        with pytest.raises(UserError, match=r"\.metadata is damaged"):
            read_metadata(step)
    finally:
        _get_layout.__defaults__ = None
        for name in [name for name, value in vars(named).items() if value is not before.get(name)]:
            setattr(named, name, before[name]) if name in before else delattr(named, name)
