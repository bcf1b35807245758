import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoint_convert.compare.tensors import compare
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.safetensors_reader import HfReader
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import load_model
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import (
    assert_import_fails,
    assert_same,
    files_of,
    load_stock,
    save_tokenizer,
    tensors_of,
    write_export,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MISSING = '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
OUTSIDE = '{"weight_map": {"a": "../outside"}}'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "source .*pickled.*safetensors"),
        (lambda folder: (folder / WEIGHTS).unlink(), "source contains no weights: .*model.safetensors"),
        (lambda folder: os.truncate(folder / WEIGHTS, 5000), "model.safetensors .*truncated"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 5}}'), "index.json: "),
        (
            lambda folder: ((folder / WEIGHTS).rename(folder.parent / "outside"), (folder / INDEX).write_text(OUTSIDE)),
            "index.json lists ../outside",
        ),
        (lambda folder: (folder / WEIGHTS).rename(folder / INDEX).write_text(MISSING), "index.json .*model-00002-of-"),
    ],
)
def test_damaged_weights_are_rejected(damage: Callable[[Path], None], message, source: Path, tmp_path: Path) -> None:
    damage(source)
    assert_import_fails(source, tmp_path, message)


def test_an_interrupt_while_safetensors_reads_stays_an_interrupt(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C raises in the torch function that safetensors calls, and torch makes another exception of that."""

    class Interrupted:
        def get_tensor(self, name: str) -> None:
            try:
                signal.raise_signal(signal.SIGINT)
                for _ in range(1000):  # a handler runs between two instructions
                    pass
            except KeyboardInterrupt as error:
                raise ValueError("could not determine the shape of object type") from error

    reader = HfReader(source)
    monkeypatch.setattr(reader, "_open", lambda name: Interrupted())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            reader.read(reader.names[0])
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("has_shards", [True, False])
def test_a_single_file_beside_the_index_of_others_is_rejected(has_shards, source, make_qwen2, tmp_path) -> None:
    """transformers would read the single file, whose weights may be others."""
    sharded = make_qwen2(save={"max_shard_size": "40KB"})
    for path in sharded.glob("model*.safetensors*" if has_shards else "*.index.json"):
        shutil.copyfile(path, source / path.name)
    message = r"source/model\.safetensors.*model\.safetensors\.index\.json.*remove the stale one"
    assert_import_fails(source, tmp_path, message)


def test_a_tokenizer_with_more_ids_than_rows_is_rejected(source: Path, tmp_path: Path) -> None:
    save_tokenizer(source, num_ids=99)
    hf_to_mcore(source, tmp_path / "fits", NewExperts(4))
    save_tokenizer(source, num_ids=100)
    assert_import_fails(source, tmp_path, "source .*100.* 99 ")


@pytest.mark.parametrize(
    "name", ["NOTICE", "README.md", "additional_chat_templates", "additional_chat_templates/a.jinja"]
)
def test_a_link_out_of_the_model_is_not_followed(name: str, source: Path, tmp_path: Path) -> None:
    """A cloned repository may contain a link to any file of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "token").write_text("hf_secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret if name == "additional_chat_templates" else secret / "token")
    assert_import_fails(source, tmp_path, f"{name}.* is a link to .*secret")


def test_links_within_a_model_and_in_the_hubs_cache_are_followed(qwen2: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in [path for path in qwen2.iterdir() if path.is_file()]:
        shutil.copyfile(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "NOTICE").symlink_to("README.md")
    (snapshot / "README.md").write_text("A card.")
    (tmp_path / "link").symlink_to(snapshot)
    hf_to_mcore(tmp_path / "link", tmp_path / "megatron", NewExperts(1))
    files, ours = files_of(tmp_path / "megatron" / "hf"), files_of(qwen2)
    assert all(files[name] == ours[name] for name in ("tokenizer.json", "chat_template.jinja"))
    assert (tmp_path / "megatron" / "hf" / "NOTICE").read_text() == "A card."
    assert not any(path.is_symlink() for path in (tmp_path / "megatron").rglob("*"))
    (private := tmp_path / "models--owner--private" / "blobs").mkdir(parents=True)
    (private / "weights").write_text("of another model")
    (snapshot / "LICENSE").symlink_to(private / "weights")
    assert_import_fails(snapshot, tmp_path, "LICENSE is a link to .*private")


def test_large_exports_are_sharded_with_an_index(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "one")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "many", max_shard_bytes=40_000)
    assert [path.name for path in tmp_path.glob("one/*.safetensors*")] == ["model.safetensors"]
    assert_same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = [*tmp_path.glob("many/*.safetensors")]
    assert len(files) > 5 and all(file.stat().st_size < 42_000 for file in files)
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "one").values())
    load_stock(tmp_path / "many", "Qwen2MoeForCausalLM")


def test_a_flipped_bit_in_the_weights_stops_every_reader(qwen2: Path, tmp_path: Path) -> None:
    """A checkpoint and an export; without their checksums, nothing else notices it."""
    export = write_export(qwen2, tmp_path, NewExperts(2), max_shard_bytes=40_000)
    megatron, out, (shard,) = tmp_path / "megatron", tmp_path / "out", export.glob("*-00002-of-*")
    imports = partial(hf_to_mcore, export, out, NewExperts(2))
    for file, readers in (
        (megatron / "release/__0_0.distcp", [lambda: mcore_to_hf(megatron, out)]),
        (shard, [imports, lambda: list(compare(export, export)), lambda: load_model(export)]),
    ):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 // 64 * 64] ^= 4
        file.write_bytes(content)
        for read in readers:
            with pytest.raises(UserError, match=f"{file.name} is damaged: its checksum"):
                read()
    mcore_to_hf(megatron, tmp_path / "unnoticed", verify=Verify.NONE)
    imports(verify=Verify.NONE)
