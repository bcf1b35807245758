"""LoRA on the trainer's samples: an interrupted run continues where it was, and only adapters change."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("peft", reason="peft is not installed: examples/real_model/install.sh")

from examples.real_model import lora
from moelpr.base.errors import UserError
from moelpr.model.metrics.run_metrics import read_run_metrics
from tests.support.hf_models import save_tokenizer

STEPS = 4


class Samples(torch.utils.data.Dataset):
    """Random tokens; reading sample `breaks_at` fails."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.tokens = torch.randint(64, (STEPS * lora.BATCH, 17), generator=torch.Generator().manual_seed(0))
        self.breaks_at = breaks_at

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.breaks_at:
            raise KeyboardInterrupt
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 64)
    return tmp_path / "base"


def trained(base: Path, run: Path, samples: Samples) -> dict[str, torch.Tensor]:
    model = lora.add_adapters(base, None, seed=1)
    lora.train(model, samples, run, STEPS, 1e-2, seed=1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_interrupted_run_ends_with_the_same_bits(base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(lora, "SAVE_INTERVAL", 2)
    whole = trained(base, tmp_path / "whole", Samples())
    # The smallest dimension of a layer is that of keys and values, 16.
    assert "rank 16, " in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        trained(base, tmp_path / "run", Samples(breaks_at=3 * lora.BATCH))
    (tmp_path / "run" / "checkpoint-3").mkdir()  # as a save that was interrupted leaves it
    (tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors").touch()
    resumed = trained(base, tmp_path / "run", Samples())
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    steps = [read_run_metrics(tmp_path / name / "metrics.jsonl").steps for name in ("whole", "run")]
    assert [step["iteration"] for step in steps[1]] == [1, 2, 3, 4]
    assert [step["lm_loss"] for step in steps[0]] == [step["lm_loss"] for step in steps[1]]


def test_only_adapters_change_and_the_merged_model_is_the_base_plus_their_product(base: Path, tmp_path: Path) -> None:
    model = lora.add_adapters(base, 3, seed=1)
    lora.train(model, Samples(), tmp_path / "run", STEPS, 1e-2, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    lora.save_merged(base, tmp_path / "adapter", tmp_path / "merged")
    start = LlamaForCausalLM.from_pretrained(base).state_dict()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    parts = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in start.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in parts:
            product = parts[f"{layer}.lora_B.default.weight"] @ parts[f"{layer}.lora_A.default.weight"]
            assert product.abs().max() > 0
            torch.testing.assert_close(merged[name], tensor + 2 * product, rtol=0, atol=1e-6)
            assert torch.equal(parts[f"{layer}.base_layer.weight"], tensor.bfloat16())
        else:
            assert torch.equal(merged[name], tensor), name


def test_a_checkpoint_that_a_full_disk_has_cut_short_is_not_continued(tmp_path: Path) -> None:
    for step, state in ((40, '{"global_step": 40}'), (80, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text('{"global_step": 90}')
    assert lora.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")


def test_a_folder_belongs_to_one_training(tmp_path: Path) -> None:
    lora.LoraSettings(3, 1e-3, None, 1).claim(tmp_path)
    lora.LoraSettings(3, 1e-3, None, 1).claim(tmp_path)
    with pytest.raises(UserError, match=r"started with lr 0\.001, not with lr 0\.003; remove"):
        lora.LoraSettings(3, 3e-3, None, 1).claim(tmp_path)
