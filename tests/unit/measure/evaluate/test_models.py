"""Models that cannot be opened; and both readers of one model, transformers and the trainer, give equal numbers."""

import json
import shutil
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base import machine
from moelpr.base.errors import UserError
from moelpr.measure.evaluate import models
from moelpr.measure.evaluate.compare import compare_models
from moelpr.measure.evaluate.models import choose_device, load_model, open_model
from moelpr.measure.evaluate.routing import RoutingObserver
from moelpr.measure.evaluate.scoring import Settings
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.megatron import cpu
from tests.support.hf_models import edit_json, edit_tensors, write_export

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, dense_dir: Path) -> dict[str, Path]:
    """The dense model and one upcycled in a first and a second round, each as checkpoint and as export."""
    folder = tmp_path_factory.mktemp("both")
    hf_to_mcore(dense_dir, folder / "dense", None)
    first = write_export(dense_dir, folder / "moe", NewExperts(3, moe_layers=[0, 2]), noise=0.5)
    second = write_export(first, folder / "second", NewExperts(2), noise=0.5)
    exports = {"dense-hf": dense_dir, "moe-hf": first, "second-hf": second}
    return exports | {"dense": folder / "dense", "moe": first.parent / "megatron", "second": second.parent / "megatron"}


@pytest.mark.usefixtures("megatron")
def test_a_checkpoint_and_its_export_have_equal_scores_routing_and_distance_from_the_base(both, texts):
    scores = compare_models(both, texts, Settings(16, 4), base=both["dense"]).scores
    for name in ("dense", "moe", "second"):
        for language in texts:
            ours, theirs = scores[name][language], scores[f"{name}-hf"][language]
            assert ours.document_bits == pytest.approx(theirs.document_bits, rel=1e-5)
            assert ours.document_correct == theirs.document_correct
            assert ours.document_tokens == theirs.document_tokens
            if name == "dense":
                assert ours.routing is theirs.routing is None
                assert ours.document_distances is None
                assert theirs.document_distances == pytest.approx([0] * len(texts[language]), abs=1e-6)
            else:
                assert ours.document_distances == pytest.approx(theirs.document_distances, rel=1e-3)
                assert ours.routing.layers == theirs.routing.layers == [0, 2]
                for actual, expected in zip(astuple(ours.routing), astuple(theirs.routing), strict=True):
                    actual, expected = torch.tensor(actual).double(), torch.tensor(expected).double()
                    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert scores["second-hf"]["en"].routing.num_original_places == 4
    assert scores["dense"]["en"].metrics["bits_per_byte"] != pytest.approx(
        scores["moe"]["en"].metrics["bits_per_byte"], rel=1e-3
    )


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_the_index_that_torch_needs_to_select_it(monkeypatch, name: str, index: int):
    """torch.cuda.set_device, which this is the first part of, does not accept torch.device("cuda")."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch.cuda._utils._get_device_index(choose_device(name)) == index


def test_gpus_that_pytorch_cannot_use_are_an_error_unless_the_cpu_is_chosen(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setattr(cpu, "is_needed", lambda: True)
    with pytest.raises(UserError, match="this machine has GPUs"):
        choose_device("auto")
    choose_device("cpu")


def test_a_checkpoint_without_a_tokenizer_is_rejected(both, tmp_path):
    for file in both["dense"].iterdir():
        if file.name != "hf":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match="no tokenizer folder .*hf"), open_model(tmp_path):
        pass


CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "/model"),
        (lambda folder: (folder / "config.json").unlink(), r"no .*config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not a tensor"), "/model"),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**9),
            "num_hidden_layers .* 10000, got 1000000000",
        ),
        # transformers would initialize it.
        (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(UP)), f" 1 tensors, {UP}"),
        # Its code would end the process.
        (lambda folder: edit_json(folder / "config.json", model_type="homemade", auto_map=CODE), "/model"),
    ],
)
def test_what_is_not_a_complete_model_of_a_known_class_is_rejected(tmp_path, dense_dir, change, message):
    folder = Path(shutil.copytree(dense_dir, tmp_path / "model"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    change(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder, device="cpu")


def test_a_document_starts_with_the_token_that_begins_texts(tmp_path: Path) -> None:
    words = WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>")
    end = {"eos_token": "</s>"}
    for folder, special, start in (("both", {"bos_token": "<s>"} | end, 1), ("eos", end, 2)):
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(tmp_path / folder)
        assert models._load_tokenizer(tmp_path / folder)[1:] == (start, 2)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("free_gib", "device", "dtype", "has_accelerate", "found"),
    [
        ([80, 80], "auto", "auto", False, {}),
        ([70, 100], "auto", "auto", True, {0: 63, 1: 90}),
        ([80, 160], "auto", "float32", True, {0: 72, 1: 144}),
        ([70, 80], "auto", "auto", False, "takes 70 GiB, GPU 0 has 63 GiB .*2 GPUs .*pip install"),
        ([70, 80], "cuda:0", "auto", True, "GPU 0 has 63 GiB .*--device auto"),
        ([70, None], "auto", "auto", True, "2 GPUs 63 GiB"),
    ],
)
def test_a_model_that_one_gpu_cannot_hold_is_spread_or_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch, free_gib: list[int], device: str, dtype: str, has_accelerate: bool, found: dict | str
) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):  # transformers reads the first only
        with open(tmp_path / name, "wb") as file:
            file.truncate(70 * GIB)  # a hole
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    asked = []

    def mem_get_info(gpu: int) -> tuple[int, int]:
        asked.append(gpu)
        if free_gib[gpu] is None:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return free_gib[gpu] * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free_gib))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(models, "find_spec", lambda name: object() if has_accelerate else None)
    arguments = tmp_path, torch.device("cuda", 0), dtype, device != "auto"
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            models._placement(*arguments)
        return
    placement = models._placement(*arguments)
    memory = {gpu: gib * GIB for gpu, gib in found.items()}
    assert placement == ({"device_map": "auto", "max_memory": pytest.approx(memory)} if found else {})
    assert found or asked == [0]  # asking a GPU takes memory of it


def test_the_files_of_the_index_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(10))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models._weight_bytes(tmp_path, "auto") == 20 and models._weight_bytes(tmp_path, "float32") == 40


def test_a_model_that_accelerate_has_placed_gives_the_same_routing(both, monkeypatch) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate (the extra `eval`)")
    results = []
    for placement in ({}, {"device_map": "auto", "max_memory": {"cpu": GIB}}):
        monkeypatch.setattr(models, "_placement", lambda *_, is_chosen, found=placement: found)
        with open_model(both["moe-hf"], dtype="float32") as loaded:
            observer, tokens = RoutingObserver(loaded), torch.arange(20)[None]
            with observer.observe(torch.ones_like(tokens, dtype=torch.bool)):
                loaded.logits(tokens)
            results.append(observer.result())
    assert results[0] == results[1]
