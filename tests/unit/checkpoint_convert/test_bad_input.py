"""Bad input ends with one sentence, and the output is absent or what it was."""

import errno
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_convert import hf_to_mcore as importer
from checkpoint_convert import mcore_to_hf as exporter
from checkpoint_convert import verify
from checkpoint_convert.comparison import max_abs_difference
from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.errors import UserError, run_command
from moelpr.model_spec import ModelSpec
from moelpr.torch_dist import TorchDistReader, TorchDistWriter


@pytest.fixture
def source(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:
    """A model folder (one file) of its own for every test to spoil."""
    return Path(shutil.copytree(make_qwen2(tokenizer=True), tmp_path / "source"))


@pytest.fixture
def checkpoint(qwen2: Path, tmp_path: Path) -> Path:
    hf_to_mcore(qwen2, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuses_import(source: Path, tmp_path: Path, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hf_to_mcore(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def refuses_export(checkpoint: Path, tmp_path: Path, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mcore_to_hf(checkpoint, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def assert_nothing_left(tmp_path: Path) -> None:
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------- import


def test_missing_folder(tmp_path: Path) -> None:
    refuses_import(tmp_path / "Qwen" / "Qwen1.5-1.8B", tmp_path, "Qwen/Qwen1.5-1.8B.*hf download")


def test_folder_without_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    refuses_import(source, tmp_path, "source .*config.json")


@pytest.mark.parametrize("text", ["{", "[]", '"qwen2"'])
def test_config_that_is_no_json_object(source: Path, tmp_path: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    refuses_import(source, tmp_path, "config.json .*JSON")


def test_unknown_architecture_names_the_known_ones(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", architectures=["BloomForCausalLM"], model_type="bloom")
    refuses_import(source, tmp_path, "LlamaForCausalLM, .*Qwen3ForCausalLM.*MixtralForCausalLM.*BloomForCausalLM")


def test_classifier_of_a_known_family(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", architectures=["Qwen2ForSequenceClassification"])
    refuses_import(source, tmp_path, "Qwen2ForSequenceClassification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "'default'.*'llama3'.*'yarn'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'llama3'.*'dynamic'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act.*'silu'.*'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": "four"}, "config.json.*num_hidden_layers"),
        ({"rope_parameters": {"rope_theta": 1000.5, "rope_type": "default"}}, "rope_theta.*1000.5"),
    ],
)
def test_what_megatron_would_compute_differently(source: Path, tmp_path: Path, changes: dict, message: str) -> None:
    edit_json(source / "config.json", **changes)
    refuses_import(source, tmp_path, message)


def test_missing_tensor(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.bias"))
    refuses_import(source, tmp_path, "model.layers.2.self_attn.k_proj.bias")


def test_misshapen_tensor(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refuses_import(source, tmp_path, rf"{name} .*\[47, 32\].*config.json.*\[48, 32\]")


def test_leftover_tensor(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refuses_import(source, tmp_path, f"source .*{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(source: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name][3, 5].fill_(value))
    refuses_import(source, tmp_path, f"source: {name} .*NaN")


def test_a_run_that_has_diverged(checkpoint: Path, tmp_path: Path) -> None:
    reader = TorchDistReader(checkpoint / "release")
    with TorchDistWriter(checkpoint / "iter_0000012") as writer:
        for key in sorted(reader.keys):
            tensor = reader.read(key).clone()
            writer.write(key, tensor.fill_(float("nan")) if key.endswith("1.mlp.router.weight") else tensor)
        writer.finish({})
    message = "iter_0000012: model.layers.1.mlp.gate.weight .*NaN.*--iteration"
    refuses_export(checkpoint, tmp_path, message, iteration=12)


def test_mixed_and_foreign_dtypes(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    refuses_import(source, tmp_path, "float16 and float32.*--dtype")
    edit_tensors(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refuses_import(source, tmp_path, "model.norm.weight.*F32.*I8")


def test_pickled_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuses_import(source, tmp_path, "source .*pickled.*safetensors")
    (source / "pytorch_model.bin").unlink()
    refuses_import(source, tmp_path, "source .*model.safetensors")


def test_truncated_weights(source: Path, tmp_path: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    refuses_import(source, tmp_path, "model.safetensors .*truncated")


def test_index_that_names_a_missing_shard(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_qwen2(save={"max_shard_size": "40KB"})
    sorted(source.glob("model-*.safetensors"))[1].unlink()
    refuses_import(source, tmp_path, "model.safetensors.index.json .*model-00002-of-")


def test_tokenizer_with_more_ids_than_rows(source: Path, tmp_path: Path, write_tokenizer: Callable[..., None]) -> None:
    write_tokenizer(source, num_ids=99)
    hf_to_mcore(source, tmp_path / "fits")
    write_tokenizer(source, num_ids=100)
    refuses_import(source, tmp_path, "source .*100.* 99 ")


def test_damaged_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    refuses_import(source, tmp_path, "tokenizer in .*source")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 1}, "K = 1 .*--topk 2"),
        ({"topk": 0}, "top-0 "),
        ({"topk": 6}, "top-6 .* 5"),
        ({"num_new_experts": 0}, "0 new experts"),
        ({"moe_layers": [1, 4]}, "layer 4.* 0 to 3"),
        ({"moe_layers": [-1]}, "layer -1"),
        ({"moe_layers": []}, "--moe-layers"),
        ({"moe_every_k_layers": 5}, "--moe-every-k-layers .*1 to 4 .* 5"),
        ({"moe_every_k_layers": 0}, "--moe-every-k-layers .*1 to 4 .* 0"),
        ({"moe_layers": [1], "moe_every_k_layers": 2}, "--moe-layers and --moe-every-k-layers"),
    ],
)
def test_impossible_experts(qwen2: Path, tmp_path: Path, options: dict, message: str) -> None:
    refuses_import(qwen2, tmp_path, message, **options)


# ---------------------------------------------------------------------------------------------------- output


def test_existing_output_is_replaced_only_with_overwrite(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron")
    before = (tmp_path / "megatron" / "model_spec.json").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=2)
    assert (tmp_path / "megatron" / "model_spec.json").read_text() == before
    hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=2, overwrite=True)
    assert ModelSpec.read(tmp_path / "megatron").moe.num_new_experts == 2
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    with pytest.raises(UserError, match="--overwrite"):
        mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf", overwrite=True)


def test_overwrite_never_deletes_a_folder_of_another_kind_or_the_input(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="home .*--save"):
        hf_to_mcore(source, tmp_path / "home", overwrite=True)
    for save in (source, source.parent, source / "inside"):
        with pytest.raises(UserError, match="source.*--save"):
            hf_to_mcore(source, save, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").is_file()
    assert (source / "model.safetensors").is_file()


def test_failed_overwrite_leaves_the_old_output(source: Path, tmp_path: Path, monkeypatch) -> None:
    hf_to_mcore(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(TorchDistWriter, "finish", _raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        hf_to_mcore(source, tmp_path / "out", start=Start(seed=7), overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def _raise_disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def exit_code(monkeypatch, main: Callable[[], None], *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def test_disk_that_fills_up_gives_one_sentence_and_code_1(qwen2: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """/dev/full refuses every write, as a full disk does; torch.save hides that behind an error of its own."""
    real_open = open

    def open_full(path, mode="r", *args, **kwargs):
        full = "w" in mode and any(kind in str(path) for kind in (".distcp", ".safetensors"))
        return real_open("/dev/full" if full else path, mode, *args, **kwargs)

    hf_to_mcore(qwen2, tmp_path / "megatron")
    monkeypatch.setattr("builtins.open", open_full)
    for main, words in (
        (importer.main, ("--hf-path", qwen2, "--num-new-experts", 4)),
        (exporter.main, ("--load", tmp_path / "megatron")),
    ):
        assert exit_code(monkeypatch, main, *words, "--save", tmp_path / "out") == 1
        assert "the disk is full" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    # With space again, the same command goes on.
    monkeypatch.undo()
    mcore_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert max_abs_difference(tmp_path / "megatron", tmp_path / "out") == 0
    assert_nothing_left(tmp_path)


def test_too_small_a_disk_is_noticed_before_writing(qwen2: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    words = ("--hf-path", qwen2, "--dense", "--save", tmp_path / "out")
    assert exit_code(monkeypatch, importer.main, *words) == 1
    assert f"the disk is full while writing {tmp_path / 'out'}" in capsys.readouterr().err


def test_commands_end_with_one_sentence_and_code_2(qwen2: Path, checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    for main, words, message in (
        (importer.main, ("--hf-path", qwen2, "--save", tmp_path / "out", "--num-new-experts", 4, "--topk", 1), "K = 1"),
        (importer.main, ("--hf-path", qwen2, "--save", tmp_path / "out"), "--num-new-experts"),
        (
            importer.main,
            ("--hf-path", qwen2, "--save", tmp_path / "out", "--dense", "--moe-layers", "1"),
            "--dense",
        ),
        (
            importer.main,
            ("--hf-path", qwen2, "--save", "x", "--num-new-experts", 1, "--moe-layers", "a"),
            "layer numbers",
        ),
        (exporter.main, ("--load", tmp_path / "none", "--save", tmp_path / "out"), "none"),
        (exporter.main, ("--load", checkpoint, "--save", tmp_path / "out", "--max-shard-size", "big"), "5GB"),
        (verify.main, (tmp_path / "none", qwen2), "none"),
    ):
        assert exit_code(monkeypatch, main, *words) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert_nothing_left(tmp_path)


# ---------------------------------------------------------------------------------------------------- export


def test_folder_without_spec(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model_spec.json").unlink()
    refuses_export(checkpoint, tmp_path, "checkpoint .*model_spec.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version .*[12].*[12]"),
        ({"family": "bloom"}, "llama, mistral, qwen2.*'bloom'"),
        ({"dtype": "int8"}, "dtype .*int8"),
        ({"moe": {"num_new_experts": 4, "topk": 1, "layers": [0]}}, "K = 1"),
        ({"moe": {"num_new_experts": 4}}, "model_spec.json"),
        ({"surprise": 1}, "model_spec.json"),
        ({"megatron_args": {"num_layers": 4}}, "hidden_size"),
    ],
)
def test_spec_that_makes_no_sense(checkpoint: Path, tmp_path: Path, changes: dict, message: str) -> None:
    edit_json(checkpoint / "model_spec.json", **changes)
    refuses_export(checkpoint, tmp_path, message)


def test_spec_that_does_not_fit_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "model_spec.json", moe={"num_new_experts": 3, "topk": 2, "layers": [0, 1, 2, 3]})
    refuses_export(checkpoint, tmp_path, r"router.weight .*\[5, 32\].*model_spec.json.*\[4, 32\]")
    edit_json(checkpoint / "model_spec.json", moe=None)
    refuses_export(checkpoint, tmp_path, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight")


def test_tracker_that_is_missing_or_wrong(checkpoint: Path, tmp_path: Path) -> None:
    refuses_export(checkpoint, tmp_path, " 7", iteration=7)
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    tracker.write_text("100")
    refuses_export(checkpoint, tmp_path, "iter_0000100")
    tracker.write_text("soon")
    refuses_export(checkpoint, tmp_path, "'soon'")
    tracker.unlink()
    refuses_export(checkpoint, tmp_path, "latest_checkpointed_iteration.txt")


def test_incomplete_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint / "release" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    refuses_export(checkpoint, tmp_path, "__0_0.distcp .*truncated")
    data.unlink()
    refuses_export(checkpoint, tmp_path, "__0_0.distcp")
    (checkpoint / "release" / ".metadata").write_bytes(b"\x80\x04nonsense")
    refuses_export(checkpoint, tmp_path, ".metadata is damaged")
    (checkpoint / "release" / ".metadata").unlink()
    refuses_export(checkpoint, tmp_path, "release .*.metadata")


def test_missing_part_of_a_stack(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path) as writer:
        writer.write_chunk("stack", torch.ones(1, 4), (3, 4), (0, 0))
        writer.write_chunk("stack", torch.ones(1, 4), (3, 4), (2, 0))
        writer.finish({})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("stack", 2), torch.ones(4))
    for index in (None, 1):
        with pytest.raises(UserError, match="stack"):
            reader.read("stack", index)


class _RunsCode:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return (Path.touch, (self._path,))


def test_a_strangers_checkpoint_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    metadata = pickle.loads((checkpoint / "release" / ".metadata").read_bytes())
    metadata.planner_data = _RunsCode(trap)
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    mcore_to_hf(checkpoint, tmp_path / "hf")
    assert not trap.exists()
    metadata.storage_data = _RunsCode(trap)
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    refuses_export(checkpoint, tmp_path, ".metadata is damaged")
    assert not trap.exists()
    pickle.loads((checkpoint / "release" / ".metadata").read_bytes())
    assert trap.exists()  # the trap works: an unrestricted reader falls into it
