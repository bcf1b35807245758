"""A base model's own texts: no text twice, the same after a kill, and by a real model as its settings say."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data_tools import generate_text
from data_tools.generation.sampling import PROMPTS, Batch, GeneratedText, generate, read_prompts, writer
from moelpr.evaluate.models import load_model
from moelpr.languages import is_code
from moelpr.process.errors import UserError
from moelpr.store.journal import resumable_directory
from moelpr.text.reading import read_documents
from tests.support.fasttext_model import write_fasttext_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=257, num_key_value_heads=1, max_position_embeddings=64, **shape))
    folder = tmp_path_factory.mktemp("base") / "base"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_prompts_are_of_many_languages_and_code() -> None:
    prompts = read_prompts(PROMPTS, [])
    assert {"und", "code", "en", "zh", "es"} <= prompts.keys() and len(prompts) > 12
    assert all(is_code(language) for language in prompts if language != "code")
    assert prompts["und"] == [""]


def test_repeated_and_short_texts_are_left_out_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    calls: list[str] = []

    def write(prompt: str, seed: int) -> list[tuple[str, int]]:
        calls.append(prompt)
        texts = [f"{prompt}{(seed + number) % 12}" for number in range(4)]
        return [*((text, 9) for text in texts), (f"{texts[0].upper()} ", 9), ("short", 1)]

    def run(folder: Path, batches: int = 1000) -> list[Batch]:
        with resumable_directory(folder, "job") as journal:
            done = []
            for batch in generate(journal, {"en": ["a", "b"], "code": ["c"]}, write, None, 30, 2, seed=1):
                done.append(batch)
                if len(done) > batches:
                    (journal.folder / "en.jsonl").open("a").write('{"text": "half')  # as of a batch that was killed
                    raise KeyboardInterrupt
            return done

    whole = run(tmp_path / "whole")[-1]
    lines = [json.loads(line) for file in ("en", "code") for line in (tmp_path / f"whole/{file}.jsonl").open()]
    texts = [line["text"] for line in lines]
    assert len(texts) == len({text.casefold() for text in texts}) == 30 == sum(whole.documents.values())
    assert all(line["language"] == ("code" if line["text"].startswith("c") else "en") for line in lines)
    assert whole.short == whole.number and 0 < whole.repeated <= 5 * whole.number - 30
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", batches=3)
    run(tmp_path / "killed")
    assert len(calls) == whole.number
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_model_without_new_texts_ends(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", "job") as journal:
        *_, last = generate(journal, {"en": ["a"]}, lambda prompt, seed: [("a b", 9)], None, 10, 2, seed=1)
    assert last.documents == {"en": 1}


def test_a_real_model_writes_texts_with_their_settings(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text('und: [""]\nen: ["sea sea sea "]\ncode: ["def "]\n')
    model = write_fasttext_model(tmp_path / "lid.bin", {"sea": "eng_Latn", "θάλασσα": "ell_Grek"})
    words = f"--model {base} --documents 12 --batch-size 3 --max-tokens 20 --min-tokens 5 --prompts {prompts} --seed 3"
    words += f" --temperature 0.8 --top-p 0.9 --device cpu --language-id {model} --min-confidence 0.9"
    for name in ("one", "two"):
        generate_text.main([*words.split(), "--output", str(tmp_path / name)])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    found = GeneratedText.read(tmp_path / "one")
    assert sum(found.documents.values()) == 12 and {"en", "code"} <= found.documents.keys()
    assert found.settings["temperature"] == 0.8 and found.settings["prompts"] == {
        "und": [""],
        "en": ["sea sea sea "],
        "code": ["def "],
    }
    assert all(text.startswith("sea sea sea ") for text in read_documents(tmp_path / "one" / "en.jsonl"))
    assert len(read_documents(tmp_path / "one")) == 12  # the record is not read as text
    assert "left out:" in capsys.readouterr().out


def test_the_probabilities_are_those_of_the_model(base: Path) -> None:
    """One token after the start token, at a temperature: against the softmax of the logits."""
    loaded = load_model(base, "cpu")
    with torch.inference_mode():
        logits = loaded.logits(torch.tensor([[loaded.start_id]]))[0, -1].float()
    expected = torch.softmax(logits / 0.5, 0)
    wanted = expected.topk(5).indices.tolist()
    counts = dict.fromkeys(wanted, 0)
    write = writer(loaded, 4000, 1, 0.5, 1.0)
    letters = {loaded.tokenizer.decode([number]): number for number in wanted}
    for text, _ in write("", 1):
        if (number := letters.get(text)) is not None:
            counts[number] += 1
    for number in (number for letter, number in letters.items() if letter.strip() and letter != "\ufffd"):
        assert counts[number] / 4000 == pytest.approx(expected[number].item(), abs=0.015)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nosuch", "there is no folder nosuch"),
        ("--model {bare} --max-tokens 50", "tokenizer"),
        ("--model {base} --temperature 0", "--temperature must be above 0"),
        ("--model {base} --top-p 2", "--top-p"),
        ("--model {base} --min-tokens 600", "above --max-tokens"),
        ("--model {base}", "below the model's 64 positions"),
        ("--model {base} --languages xx", "no prompts in xx"),
        ("--model {base} --prompts nosuch.yaml", "nosuch.yaml"),
        ("--model {base} --language-id nosuch.bin", "no model nosuch.bin"),
        ("--model {base} --batch-size 0", "--batch-size must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        generate_text.main([*words.format(base=base, bare=bare).split(), "--output", "out", "--device", "cpu"])
    assert not (tmp_path / "out").exists()
