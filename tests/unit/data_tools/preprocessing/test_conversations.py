"""Conversations become the tokens and the assistant's mask that transformers makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import merge_data, sample_data
from data_tools.corpus.corpus import Corpus
from data_tools.preprocessing.conversations import ChatTemplate, counted_tokens, load_chat_template
from moelpr.base import chat_templates
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.language_bits import loss_bits_path
from moelpr.data.manifest import Manifest
from moelpr.data.text.documents import BadLine
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.chat import FORGETFUL, MARKED, UNMARKED, save_tokenizer, with_template, write_conversations
from tests.support.packed_files import PACK
from tests.support.small_tokenizers import KINDS
from tests.unit.data_tools.conftest import Output

ENGLISH = ["--language-key", "lang", "--original-languages", "en", "--expanded-languages", "el"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of tokenizer, whose template marks turns; `KIND-unmarked` has it without marks."""
    folder = tmp_path_factory.mktemp("tokenizers")
    actual = {kind: save_tokenizer(folder / kind, kind, MARKED) for kind in KINDS}
    return actual | {f"{kind}-unmarked": with_template(actual[kind], folder / f"{kind}-u", UNMARKED) for kind in KINDS}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    lines = [write_conversations(tmp_path / f"{name}.jsonl", name, 12).read_text() for name in ("en", "el")]
    (tmp_path / "both.jsonl").write_text("".join(lines))
    return tmp_path / "both.jsonl"


@pytest.fixture
def chat(preprocess: Callable[..., Output]) -> Callable[..., str]:
    """Preprocesses conversations, and returns the corpus."""

    def run(tokenizer: Path, *words: Any, **options: Any) -> str:
        return preprocess("--conversations", *ENGLISH, *words, tokenizer=tokenizer, **options).path("messages")

    return run


def documents(prefix: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """IDs, bits of the loss and language bits of each conversation."""
    corpus, start, actual = Corpus(prefix), 0, []
    corpus.verify()
    for index in range(corpus.num_documents):
        ids, bits = corpus.document(index)
        actual.append((ids.tolist(), corpus.loss_bits.slice(start, start + len(ids)).tolist(), bits.tolist()))
        start += len(ids)
    return actual


@pytest.mark.parametrize("template", ["", "-unmarked"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_mask_are_those_of_transformers(tokenizers, jsonl: Path, chat, kind: str, template: str) -> None:
    """Also of a template without marks, whose turns are found by rendering the conversation's beginnings."""
    from transformers import AutoTokenizer

    actual = documents(chat(tokenizers[kind + template], "--input", jsonl))
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
    for line, (ids, counts, bits) in zip(jsonl.read_text().splitlines(), actual, strict=True):
        row = json.loads(line)
        wanted = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert (ids, counts) == (wanted["input_ids"], wanted["assistant_masks"])
        assert set(bits) == {int(row["lang"] == "en")}


@pytest.fixture(scope="module")
def templates(tokenizers: dict[str, Path]) -> list[Any]:
    return [load_chat_template(str(tokenizers[name]), "") for name in ("qwen", "qwen-unmarked")]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=3))
def test_beginnings_tell_the_turns_that_marks_tell(templates: list[Any], contents: list[tuple[str, str]]) -> None:
    pairs = [zip(("user", "assistant"), pair, strict=True) for pair in contents]
    messages = [{"role": role, "content": content} for pair in pairs for role, content in pair]
    marked, unmarked = (template.render({"messages": messages}, "messages") for template in templates)
    assert marked == unmarked


def test_the_tokens_of_turns_by_hand() -> None:
    starts = np.array([0, 2, 5, 5, 7, 9])
    assert counted_tokens(starts, [(6, 8)]).tolist() == [0, 0, 1, 1, 1, 0]
    assert counted_tokens(starts, [(0, 3), (9, 11)]).tolist() == [0, 1, 0, 0, 0, 1]  # nothing predicts the first
    assert counted_tokens(starts, [(5, 5)]).tolist() == [0] * 6


def test_shards_and_parquet_are_the_same_corpus(tokenizers, jsonl: Path, chat, tmp_path: Path) -> None:
    whole = chat(tokenizers["qwen"], "--input", jsonl)
    (tmp_path / "both.parquet").write_bytes(PACK["parquet"](jsonl.read_bytes()))
    table = chat(tokenizers["qwen"], "--input", tmp_path / "both.parquet", out="out/table")
    for shard in (0, 1):
        words = ["--input", jsonl, "--num-shards", "2", "--shard", shard]
        chat(tokenizers["qwen"], *words, out="out/shards")
    shards = f"{tmp_path}/out/shards_messages_document"
    call(merge_data.main, ["--output-prefix", shards, "--num-shards", "2", "--remove-input"])
    for other in (table, shards):
        for suffix in ("bin", "idx", "lang", "loss"):
            assert Path(f"{whole}.{suffix}").read_bytes() == Path(f"{other}.{suffix}").read_bytes()
    assert not [*tmp_path.glob("out/shards*shard-*")]
    words = ["--input", whole, "--output-prefix", shards, "--original-documents", "1", "--overwrite"]
    with pytest.raises(UserError, match="--max-samples"):
        call(sample_data.main, words)


def test_a_corpus_of_text_replaces_one_of_conversations(tokenizers, jsonl: Path, chat, preprocess) -> None:
    prefix = chat(tokenizers["qwen"], "--input", jsonl)
    assert Manifest.read(prefix).files.keys() == {"bin", "idx", "lang", "loss"}
    text = [{"messages": "no conversation", "lang": "en"}]
    preprocess(text, "--json-keys", "messages", *ENGLISH, "--overwrite", tokenizer=tokenizers["qwen"])
    assert not loss_bits_path(prefix).exists() and Corpus(prefix).loss_bits is None


def test_a_damaged_loss_file_is_noticed(tokenizers, jsonl: Path, chat) -> None:
    path = loss_bits_path(chat(tokenizers["qwen"], "--input", jsonl))
    content = path.read_bytes()
    path.write_bytes(content[:70] + bytes([content[70] ^ 1]) + content[71:])
    with pytest.raises(UserError, match=r"\.loss"):
        Corpus(str(path).removesuffix(".loss")).verify()


USER, ANSWER = {"role": "user", "content": "light"}, {"role": "assistant", "content": "door"}
BAD = {
    "no assistant turn": [USER],
    "unknown role robot": [USER, {"role": "robot", "content": "x"}, ANSWER],
    "tokens, more than --max-tokens 60": [USER, ANSWER | {"content": "x y " * 60}],
    '"content" of message 2 is a list': [USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    '"content" of message 2 is null': [USER, {"role": "assistant", "content": None}],
    '"role" of message 1 is missing': [{"content": "x"}, ANSWER],
    'message 2 has "tool_calls"': [USER, ANSWER | {"tool_calls": [{"name": "f"}]}],
    "message 1 is a string": ["light", ANSWER],
    "an empty list": [],
    "contains a string, not a list": "light",
}


def test_bad_conversations_are_named_by_line_skipped_and_counted(tokenizers, chat, tmp_path: Path, capsys) -> None:
    lines = [{"messages": messages, "lang": "en"} for messages in [[USER, ANSWER], *BAD.values()]]
    with pytest.raises(UserError, match=r"lines\.jsonl:2: the conversation has no assistant turn"):
        chat(tokenizers["qwen"], lines, "--max-tokens", "60")
    prefix = chat(tokenizers["qwen"], lines, "--max-tokens", "60", "--on-error", "skip", "--max-bad-share", "1")
    assert len(documents(prefix)) == 1 and Manifest.read(prefix).skipped_lines == len(BAD)
    skipped = (tmp_path / "out" / "a.skipped.txt").read_text().splitlines()
    for number, (line, wanted) in enumerate(zip(skipped, BAD, strict=True), start=2):
        assert f"lines.jsonl:{number}: " in line and wanted in line
    assert f"{len(BAD)} lines were skipped" in capsys.readouterr().err


def test_templates_that_cannot_be_used_are_refused(tokenizers, jsonl: Path, chat, tmp_path: Path) -> None:
    none = with_template(tokenizers["qwen"], tmp_path / "none", None)
    with pytest.raises(UserError, match=f"{none} has no chat template"):
        chat(none, "--input", jsonl)
    with pytest.raises(UserError, match=r"<\|im_start\|>.* not the same token"):
        chat(tokenizers["qwen"], "--input", jsonl, "--chat-template-from", tokenizers["llama2"])
    forgetful = with_template(tokenizers["qwen"], tmp_path / "forgetful", FORGETFUL)
    thinking = [USER, ANSWER | {"content": "thought> door"}, USER, ANSWER]
    with pytest.raises(UserError, match=r"lines\.jsonl:1: .*no \{% generation %\} blocks.*message 2"):
        chat(forgetful, [{"messages": thinking, "lang": "en"}])
    (tmp_path / "marked.jinja").write_text(MARKED)  # a file may have the template
    thought = documents(chat(forgetful, "--input", jsonl, "--chat-template-from", tmp_path / "marked.jinja"))
    assert thought == documents(chat(tokenizers["qwen"], "--input", jsonl, out="out/folder"))
    template = load_chat_template(str(tokenizers["qwen"]), "")
    template.check_tokens(load_tokenizer("HuggingFaceTokenizer", str(tokenizers["qwen"])), "qwen")


@pytest.mark.parametrize(
    "body", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10**9) }}"]
)
def test_a_template_that_takes_too_much_is_refused(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_MOST_CPU_S", 0.3)
    with pytest.raises(BadLine, match="template refuses"):
        ChatTemplate("x", body, {}, {}).render({"messages": [USER, ANSWER]}, "messages")
