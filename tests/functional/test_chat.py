"""Real runs of launch/sft.sh on the conversations of a tiny chat model: it learns to answer, and keeps what it had."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from benchmarks.common import qwen2_config
from checkpoint_convert.compare.tensors import compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from data_tools import preprocess_data
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.families.new_experts import NewExperts
from tests.functional.test_training import cut_back, metrics, model_tensors, run_to_the_end, tensors
from tests.slurm.material import differences
from tests.support.chat import MARKED, conversations_in, save_tokenizer, write_conversations
from tests.support.hf_models import edit_json, load_stock, our_logits

LENGTH = "192"
STEPS = ["--seq-length", LENGTH, "--micro-batch-size", "1", "--train-iters", "6", "--lr-warmup-iters", "0"]
LONGER = ["--train-iters", "40", "--save-interval", "40", "--no-save-optim"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned conversations in English, upcycled, and corpora in English and Greek."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder / "hf"))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(qwen2_config(2, 32, 64, 512, 256, tie_word_embeddings=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rendered = (tokenizer.apply_chat_template(messages)["input_ids"] for messages in conversations_in("en", 200))
    ids = torch.tensor([id for conversation in rendered for id in conversation])
    rows = ids[: len(ids) // 96 * 96].view(-1, 96)
    for _ in range(60):
        chosen = rows[torch.randint(len(rows), (8,))]
        optimizer.zero_grad()
        model(chosen, labels=chosen).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "hf")
    hf_to_mcore(folder / "hf", folder / "upcycled", NewExperts(4, topk=2, original_copies=2))
    for language in ("en", "el"):
        lines = write_conversations(folder / f"{language}.jsonl", language, 80, seed=1)
        words = ["--input", lines, "--conversations", "--max-tokens", LENGTH, "--language", language]
        words += ["--original-languages", "en", "--tokenizer-type", "HuggingFaceTokenizer", "--workers", "1"]
        words += ["--tokenizer-model", folder / "hf", "--output-prefix", folder / language]
        call(preprocess_data.main, [str(word) for word in words])
    return folder


def command(material: Path, save: Path, *words: str) -> list[str | Path]:
    data = [word for name in ("en", "el") for word in ("1", material / f"{name}_messages_document")]
    start = ["sft", "--pretrained-checkpoint", material / "upcycled", "--data-path", *data, "--save", save]
    return [*start, "--save-interval", "3", *STEPS, *words]


@pytest.fixture(scope="module")
def sft(material: Path) -> Path:
    """Six steps in one process, saved after steps 3 and 6."""
    run_to_the_end(*command(material, material / "sft"))
    return material / "sft"


@pytest.fixture(scope="module")
def longer(material: Path) -> dict[str, Path]:
    """Forty steps with a weight of the LPR loss: of 1, as a run this short needs it, and of 0."""
    runs = {weight: material / f"longer-{weight}" for weight in ("1", "0")}
    for weight, save in runs.items():
        run_to_the_end(*command(material, save, *LONGER, "--lpr-loss-coeff", weight))
    return runs


def test_a_resumed_run_is_the_unbroken_one_bit_by_bit(material: Path, sft: Path) -> None:
    resumed = cut_back(sft, material / "resumed")
    run_to_the_end(*command(material, resumed))
    assert differences(sft, resumed) == []


def test_two_expert_parallel_ranks_train_as_one(material: Path, sft: Path) -> None:
    """Their micro-batches count differently many tokens, which all weigh the same."""
    both = material / "two-ranks"
    run_to_the_end(*command(material, both, "--expert-model-parallel-size", "2"), ranks=2)
    for one, two in zip(metrics(sft), metrics(both), strict=True):
        for name in ("lm_loss", "lm_loss_original", "lm_loss_expanded", "lpr_loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_only_new_experts_and_routers_change_and_the_export_has_them(material: Path, sft: Path) -> None:
    start = TorchDistReader(material / "upcycled" / "release")
    trained = model_tensors(tensors(sft, 6))
    for key, value in trained.items():
        assert torch.equal(value, start.read(key)) != (".mlp.router." in key or ".mlp.experts." in key), key
    mcore_to_hf(sft, material / "sft-hf")
    assert largest_difference(compare_frozen(material / "hf", material / "sft-hf")) == 0.0
    state = load_stock(material / "sft-hf").state_dict()
    router = next(value for key, value in trained.items() if ".layers.0.mlp.router.weight" in key)
    assert torch.equal(state["model.layers.0.mlp.gate.weight"].float(), router.float())
    template, base = (material / name / "chat_template.jinja" for name in ("sft-hf", "hf"))
    assert template.read_text() == base.read_text()


def test_tokens_that_choose_only_copies_keep_the_bases_logits_bit_for_bit(material: Path, sft: Path) -> None:
    def prefers_copies(model: torch.nn.Module) -> None:
        preference = torch.tensor([100.0] * 2 + [0.0] * 4)
        for layer in model.decoder.layers:
            layer.mlp.router.gating = lambda hidden: torch.randn(*hidden.shape[:2], 6) + preference

    tokens = torch.randint(0, 500, (2, 48))
    hf_to_mcore(material / "hf", material / "dense", None)
    base = our_logits(material / "dense", tokens)
    assert torch.equal(our_logits(sft, tokens, prefers_copies), base)
    assert not torch.equal(our_logits(sft, tokens), base)


def test_an_export_gets_the_template_and_the_end_of_answers_of_a_chat_model(material: Path, sft: Path) -> None:
    chat = shutil.copytree(material / "hf", material / "instruct")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", MARKED
    tokenizer.save_pretrained(chat)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    edit_json(chat / "config.json", eos_token_id=end)
    mcore_to_hf(sft, material / "with-template", chat_template_from=chat)
    actual = AutoTokenizer.from_pretrained(material / "with-template")
    assert (actual.chat_template, actual.eos_token) == (MARKED, "<|im_end|>")
    assert actual("Ανάψτε το <|im_start|> light").input_ids == tokenizer("Ανάψτε το <|im_start|> light").input_ids
    for name in ("config.json", "generation_config.json"):
        assert json.loads((material / "with-template" / name).read_text())["eos_token_id"] == end
    other = save_tokenizer(material / "other", "llama2")
    with pytest.raises(UserError, match=r"<\|im_start\|>.* not the same token"):
        mcore_to_hf(sft, material / "refused", chat_template_from=other)
    assert not (material / "refused").exists()


def test_the_assistants_turns_are_learned(longer: dict[str, Path]) -> None:
    """Also without the LPR loss; the loss is the assistant's only, in both languages."""
    for run in longer.values():
        losses = [record["lm_loss_expanded"] for record in metrics(run)]
        assert max(losses[-3:]) < 0.85 * losses[0]


def test_the_lpr_loss_keeps_the_distribution_on_original_language_prompts(material: Path, longer) -> None:
    """KL divergence from the base on 40 English prompts, of tokens after the template's own start of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(material / "hf")
    base = AutoModelForCausalLM.from_pretrained(material / "hf")
    divergence = dict.fromkeys(longer, 0.0)
    for weight, run in longer.items():
        mcore_to_hf(run, material / f"{run.name}-hf")
        model = load_stock(material / f"{run.name}-hf")
        for messages in conversations_in("en", 40, seed=2):
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")
            with torch.no_grad():
                old, new = (one(prompt["input_ids"]).logits[0].float().log_softmax(-1) for one in (base, model))
            divergence[weight] += float((old.exp() * (old - new)).sum(-1).mean())
    assert divergence["1"] < 0.6 * divergence["0"]
