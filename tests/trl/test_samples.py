"""The samples are those that TRL's SFTTrainer makes of the same file with `assistant_only_loss`.

make test-trl
"""

import json
import subprocess
from pathlib import Path

import pytest

from data_tools import preprocess_data
from data_tools.corpus.corpus import Corpus
from data_tools.preprocessing.conversations import ChatTemplate
from moelpr.base.settings import call
from moelpr.data.text.documents import BadLine
from tests.support.chat import MARKED, UNMARKED, save_tokenizer, with_template, write_conversations

ROOT = Path(__file__).parents[2]
TRL = ROOT / ".venv-trl"
# Prints the IDs and the labels of each conversation, as they enter the model.
SAMPLES = """
import json, sys
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
model, tokenizer, file, output = sys.argv[1:]
settings = SFTConfig(output, assistant_only_loss=True, max_length=None, report_to="none", use_cpu=True, bf16=False)
data = load_dataset("json", data_files=file, split="train", cache_dir=output)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
for row in trainer.train_dataset:
    batch = trainer.data_collator([row])
    print("sample", json.dumps([batch["input_ids"][0].tolist(), batch["labels"][0].tolist()]))
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 🎉"}


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_ids_and_labels_are_trls(tmp_path: Path, template: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    file = write_conversations(tmp_path / "chat.jsonl", "el", 30)
    marked = save_tokenizer(tmp_path / "marked", "qwen", MARKED)
    shape = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=600)).save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", marked, file, tmp_path / "trl"]
    done = subprocess.run([TRL / "bin/python", "-c", SAMPLES, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = [
        json.loads(line.removeprefix("sample ")) for line in done.stdout.splitlines() if line.startswith("sample ")
    ]

    ours = with_template(marked, tmp_path / "ours", template)
    command = f"--input {file} --conversations --language el --original-languages en --output-prefix {tmp_path / 'c'}"
    call(preprocess_data.main, [*command.split(), "--tokenizer-type=HuggingFaceTokenizer", f"--tokenizer-model={ours}"])
    corpus, start = Corpus(tmp_path / "c_messages_document"), 0
    assert corpus.num_documents == len(theirs) == 30
    for index, (ids, labels) in enumerate(theirs):
        actual, _ = corpus.document(index)
        counts = corpus.loss_bits.slice(start, start + len(actual)).tolist()
        start += len(actual)
        assert actual.tolist() == ids
        assert [id if is_counted else -100 for id, is_counted in zip(ids, counts, strict=True)] == labels


# Published templates without marks, for which TRL has the same with marks.
SAME = "cohere cohere2 gemma gemma3 lfm2 lfm2_v2 llama3 qwen2_5_vl qwen3_instruct_2507 qwen3_vl smolvlm".split()
# TRL also trains the line break between "assistant" and the answer, which is part of the prompt.
LONGER = {"qwen2_5": "\n"}


@pytest.mark.parametrize("name", [*SAME, *LONGER])
@pytest.mark.parametrize("messages", [[USER, ANSWER], [USER, ANSWER, USER, ANSWER | {"content": " no "}]])
def test_turns_of_a_template_without_marks_are_those_that_trl_marks(name: str, messages: list) -> None:
    (folder,) = TRL.glob("lib/python*/site-packages/trl/chat_templates")
    files = (folder / f"{name}.jinja", folder / f"{name}_training.jinja")
    ours, theirs = (ChatTemplate(name, file.read_text(), SPECIAL, {}).render({"m": messages}, "m") for file in files)
    assert ours.text == theirs.text
    added = len(LONGER.get(name, ""))
    assert ours.turns == [(start + added, end) for start, end in theirs.turns]


def test_a_template_that_leaves_out_earlier_thoughts_is_refused_without_marks() -> None:
    (folder,) = TRL.glob("lib/python*/site-packages/trl/chat_templates")
    messages = {"m": [USER, ANSWER, USER, ANSWER]}
    with pytest.raises(BadLine, match="no {% generation %} blocks"):
        ChatTemplate("qwen3", (folder / "qwen3.jinja").read_text(), SPECIAL, {}).render(messages, "m")
    assert ChatTemplate("q", (folder / "qwen3_training.jinja").read_text(), SPECIAL, {}).render(messages, "m").turns
