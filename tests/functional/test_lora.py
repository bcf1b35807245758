"""LoRA on the stages' samples: a run that is stopped ends with the same bits, and only adapters change."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import write_corpus
from moelpr.base import ranks
from moelpr.base.command import STOPPED
from moelpr.base.errors import StoppedError, UserError
from moelpr.base.settings import call
from moelpr.base.versions import require_package
from moelpr.model.megatron import bootstrap
from moelpr.model.metrics.run_metrics import read_run_metrics
from moelpr.train import lora
from tests.support.hf_models import save_tokenizer

pytest.importorskip("peft", reason="peft is not installed: the extra lora")

STEPS, BATCH, LENGTH = 4, 4, 16
Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Run the command on a tiny base and a random corpus: returns the folder of the run, next to which `hf-RUN` is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # transformers' Trainer takes NumPy's classes back from torch.load when it resumes, Megatron's tests need them.
    safe_globals = torch.serialization.get_safe_globals()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained("base")
    save_tokenizer(tmp_path / "base", 64)
    random = np.random.default_rng(0)
    write_corpus(tmp_path / "corpus", 64, ((random.integers(0, 64, 50), False) for _ in range(40)))

    def train(run: str = "run", *words: str, ranks: int = 1) -> Path:
        command = f"--hf-path base --data-path corpus --save {run} --export hf-{run} --train-tokens 200 --lr 1e-2"
        command += f" --global-batch-size {BATCH} --micro-batch-size 2 --seq-length {LENGTH} --rank 3 --save-interval 2"
        if ranks == 1:
            call(lora.main, [*command.split(), *words])
        else:
            launcher = f"-m moelpr.torchrun --standalone --nproc-per-node {ranks} -m moelpr train lora {command}"
            subprocess.run([sys.executable, *launcher.split(), *words], check=True)
        return Path(run)

    with mock.patch.dict(os.environ):  # the command sets variables of its process
        yield train
    torch.serialization.add_safe_globals(safe_globals)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_only_adapters_change_and_the_merged_model_is_the_base_plus_their_product(train: Train) -> None:
    run = train()  # 200 tokens are 4 steps of 64
    assert [step["iteration"] for step in read_run_metrics(run / "metrics.jsonl").steps] == [1, 2, 3, 4]
    start = LlamaForCausalLM.from_pretrained("base").state_dict()
    merged = LlamaForCausalLM.from_pretrained("hf-run").state_dict()
    adapter = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter_of(run).items()}
    for name, tensor in start.items():
        if (down := adapter.get(name.replace(".weight", ".lora_A.weight"))) is not None:
            product = adapter[name.replace(".weight", ".lora_B.weight")] @ down
            assert product.abs().max() > 0 and down.shape[0] == 3
            torch.testing.assert_close(merged[name], tensor + 2 * product, rtol=0, atol=1e-6)
        else:
            assert torch.equal(merged[name], tensor), name
    assert sum(name.endswith("lora_A.weight") for name in adapter) == 2 * 7  # all linear layers
    (run / "FINISHED").unlink(), shutil.rmtree("hf-run")
    train()
    again = LlamaForCausalLM.from_pretrained("hf-run").state_dict()
    assert torch.equal(again["model.norm.weight"], start["model.norm.weight"])


def test_a_run_that_is_stopped_ends_with_the_same_bits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.install_patches()
    with bootstrap.single_process():
        whole = train("whole")
        assert torch.distributed.is_initialized(), "one rank leaves the process group of its caller"
    handler, measured = signal.getsignal(signal.SIGTERM), iter(range(1, 9))

    def ask_to_stop_in_step_2(process: int) -> int:
        if next(measured) == 2:
            signal.raise_signal(signal.SIGTERM)
        return 1

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="stopped after step 3 of 4"):
        patch.setattr(lora.machine, "peak_memory", ask_to_stop_in_step_2)
        train()
    assert not Path("hf-run").exists() and signal.getsignal(signal.SIGTERM) == handler
    (Path("run") / "checkpoint-9").mkdir()  # as a save that was interrupted leaves it
    run = train()
    expected, actual = adapter_of(whole), adapter_of(run)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    losses = [[step["lm_loss"] for step in read_run_metrics(one / "metrics.jsonl").steps] for one in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_two_ranks_train_as_one_also_if_they_are_stopped(train: Train) -> None:
    one, two = train("one"), Path("two")
    two.mkdir(), (two / "STOP").touch()
    with pytest.raises(subprocess.CalledProcessError, match=f"status {STOPPED}"):
        train("two", ranks=2)
    assert [path.name for path in two.glob("checkpoint-*")] == ["checkpoint-1"] and not (two / "STOP").exists()
    train("two", ranks=2)
    assert len((two / "metrics.jsonl").read_text().splitlines()) == STEPS  # none twice
    losses = [[step["lm_loss"] for step in read_run_metrics(run / "metrics.jsonl").steps] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[1]) == STEPS
    expected, actual = adapter_of(one), adapter_of(two)
    start = {name: tensor for name, tensor in expected.items() if "lora_B" in name}
    assert max(tensor.abs().max() for tensor in start.values()) > 0.01  # adapters start at 0
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2e-3)
    assert Path("hf-two/model.safetensors").is_file()


def test_gpus_share_a_step_if_its_sequences_allow(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    for name, instead in (("become", became.append), ("train", lambda *_: None), ("merge", lambda *_: None)):
        monkeypatch.setattr(lora, name, instead)
    monkeypatch.setattr(sys, "argv", ["moelpr train lora", "--rank", "3"])
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)  # in this process, other tests initialize Megatron
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for gpus, number in (("0,1,2", 2), ("3", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        train()
        launcher = f"-m moelpr.torchrun --standalone --nproc-per-node {number} -m moelpr train lora --rank 3"
        assert [words[1:] for words in became] == [launcher.split()] * (number > 1)
        became.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("WORLD_SIZE", "1")  # a launcher that asked for one rank
    train()
    assert not became
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 ranks cannot share the 2 micro-batches of a step; start fewer"):
        train("other")


def test_a_folder_belongs_to_one_training(train: Train) -> None:
    train()
    train("run", "--micro-batch-size", "4")
    with pytest.raises(UserError, match=r"--save run was started with lr 0\.01, not 0\.003; remove it"):
        train("run", "--lr", "3e-3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--modules no_such", "--modules no_such: .*; name modules of the base"),
        ("--data-path none", "--data-path none is not a corpus; make one with"),
        ("--data-path 1 corpus corpus corpus", "has a weight for some corpora only"),
        ("--data-path corpus corpus --train-tokens 8K", "corpora without weights are read once, .* 248 samples"),
        ("--micro-batch-size 3", "--global-batch-size 4 must be a multiple of --micro-batch-size, got 3"),
        ("--train-iters=-1", "--train-iters must be at least 1, got -1"),
        ("--train-epochs nan", "--train-epochs must be at least 0"),
        ("--train-tokens 10", "10 tokens fill no step of 4 sequences of 16 tokens"),
    ],
)
def test_wrong_arguments_are_one_sentence(train: Train, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train("run", *words.split())


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft .*\[lora\]"):
        require_package("peft", "lora")
