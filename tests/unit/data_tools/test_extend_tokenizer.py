"""The command, on the three kinds of tokenizers that it extends: an extended tokenizer is compared with the old one."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import extend_tokenizer
from data_tools.preprocessing import batches
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.tokenizers.base import vocabulary_checksum
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VocabularyExtension
from tests.support.small_tokenizers import EXPANDED, KINDS, ORIGINAL, documents_in

NUMBER = 120
DOCUMENTS = [text for documents in (EXPANDED | ORIGINAL).values() for text in documents]
WORDS = st.sampled_from([word for text in DOCUMENTS[::10] for word in text.split()])
LETTERS = st.text(max_size=40) | st.text("λόγος őab ▁\n.", max_size=40)
ANY_TEXT = LETTERS | st.sampled_from(DOCUMENTS) | st.lists(WORDS, max_size=9).map(" ".join)


def write(path: Path, documents: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), "utf-8")
    return path


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for language, documents in (ORIGINAL | EXPANDED).items():
        write(folder / f"{language}.jsonl", documents)
    return folder


@pytest.fixture(scope="session")
def old_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) / "old" for kind in KINDS}
    for kind, folder in folders.items():
        KINDS[kind](folder)
    return folders


@pytest.fixture(scope="session")
def extend(text_folder: Path, old_folders: dict[str, Path]) -> Callable[..., Path]:
    """Runs the command in this process; later words override earlier ones."""

    def run(save: Path, *words: str | Path, kind: str = "qwen") -> Path:
        inputs = [f"{language}={text_folder}/{language}.jsonl" for language in ("el", "hu", "en", "es")]
        fixed = ["--tokenizer", old_folders[kind], "--input", *inputs[:2], "--original", *inputs[2:], "--save", save]
        call(extend_tokenizer.main, [*map(str, [*fixed, "--num-new-tokens", NUMBER, "--workers", 1, *words])])
        return save

    return run


def test_long_documents_are_left_out(extend, tmp_path, monkeypatch, capfd) -> None:
    saved = []
    monkeypatch.setattr(batches, "BATCH_BYTES", 3_000)
    monkeypatch.setattr(batches, "DOCUMENT_BYTES", 10_000)
    for name, first in (("without", []), ("with", ["\n".join(ORIGINAL["en"])])):
        text = write(tmp_path / f"{name}.jsonl", [*first, *ORIGINAL["en"]])
        saved.append((extend(tmp_path / name, "--original", f"en={text}") / "tokenizer.json").read_bytes())
    assert saved[0] == saved[1] and "with.jsonl:1: a document of" in capfd.readouterr().err


class Pair:
    """An old tokenizer and its extension, as stock transformers loads them."""

    def __init__(self, old: Path, new: Path) -> None:
        from transformers import AutoTokenizer

        self.folders = old, new
        self.old, self.new = (AutoTokenizer.from_pretrained(folder) for folder in (old, new))
        self.extension = VocabularyExtension.read(new)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        old, new = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (self.old, self.new))
        return old, new

    def replaced(self, ids: list[int]) -> list[int]:
        """IDs with the old tokens that new ones replace."""
        first = self.extension.first_new_id
        return [old for id in ids for old in (self.extension.replaces[id - first] if id >= first else [id])]


@pytest.fixture(scope="session", params=KINDS)
def pair(request, tmp_path_factory, extend: Callable[..., Path], old_folders: dict[str, Path]) -> Pair:
    save = extend(tmp_path_factory.mktemp("extended") / request.param, kind=request.param)
    return Pair(old_folders[request.param], save)


def test_original_documents_are_tokenized_as_before(pair: Pair) -> None:
    for text in [text for documents in ORIGINAL.values() for text in documents]:
        old, new = pair.encode(text)
        assert old == new


def test_expanded_text_not_learned_from_takes_fewer_tokens(pair: Pair) -> None:
    for language in EXPANDED:
        texts = documents_in(language, 20, seed=1)
        old, new = (sum(map(len, ids)) for ids in zip(*map(pair.encode, texts), strict=True))
        assert old / new > 1.6


@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=150)
def test_new_tokens_replace_what_the_old_tokenizer_gives_and_decode_to_the_same(pair: Pair, text: str) -> None:
    old, new = pair.encode(text)
    assert pair.new.decode(new) == pair.old.decode(old)
    parts = json.loads(pair.new.backend_tokenizer.to_str())
    if not parts["model"]["ignore_merges"]:
        assert pair.replaced(new) == old
    if not parts["model"]["byte_fallback"] and parts["normalizer"] is None:
        assert pair.new.decode(new) == text


def test_old_ids_and_settings_survive_loading_and_saving(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    old_vocabulary = pair.old.get_vocab()
    first, number = pair.extension.first_new_id, pair.extension.number
    assert (first, number) == (len(pair.old), NUMBER)
    names = {path.name for path in pair.folders[1].iterdir()}
    assert not names & {"tokenizer.model", "vocab.json", "merges.txt"}  # slow tokenizers
    pair.new.save_pretrained(tmp_path)
    for tokenizer in (pair.new, AutoTokenizer.from_pretrained(tmp_path)):
        vocabulary = tokenizer.get_vocab()
        assert {token: vocabulary[token] for token in old_vocabulary} == old_vocabulary
        assert sorted(vocabulary.values()) == list(range(first + number))
        assert tokenizer.special_tokens_map == pair.old.special_tokens_map
        assert tokenizer.chat_template == pair.old.chat_template
        messages = [{"role": "user", "content": "φως"}]
        assert "<|user|>φως" in tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer("a<|user|>b")["input_ids"] == pair.old("a<|user|>b")["input_ids"]


def test_the_extension_names_the_old_tokenizer(pair: Pair) -> None:
    old, new = (load_tokenizer("HuggingFaceTokenizer", str(folder)) for folder in pair.folders)
    assert pair.extension.old_fingerprint == old.fingerprint() != new.fingerprint()
    checksum = vocabulary_checksum(new.vocabulary(), pair.extension.first_new_id)
    assert pair.extension.old_vocabulary_sha256 == vocabulary_checksum(old.vocabulary(), old.vocab_size) == checksum


def test_bytes_do_not_depend_on_workers_or_the_order_of_files(tmp_path: Path, extend: Any, text_folder: Path) -> None:
    for name, part in (("1", EXPANDED["el"][70:]), ("2", EXPANDED["el"][:70])):
        write(tmp_path / f"{name}.jsonl", part)
    files = [f"hu={text_folder}/hu.jsonl", f"el={tmp_path}/*.jsonl"]
    first, second = extend(tmp_path / "a"), extend(tmp_path / "b", "--input", *files, "--workers", 2)
    for name in ("tokenizer.json", "vocabulary_extension.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(("share", "changed"), [("0", 0), ("0.05", 10)])
def test_a_share_of_original_documents_may_change(tmp_path, extend, text_folder, capsys, share, changed) -> None:
    mixed = write(tmp_path / "mixed.jsonl", [f"{number} {EXPANDED['el'][0]}" for number in range(10)])
    originals = ["--original", f"en={text_folder}/en.jsonl", f"es={text_folder}/es.jsonl", f"en={mixed}"]
    extend(tmp_path / "out", *originals, "--max-changed-share", share)
    assert f"\noriginal text: {changed} of 310 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--num-new-tokens", "50000"], "gives only .* new tokens"),
        (["--num-new-tokens", "0"], "--num-new-tokens"),
        (["--max-changed-share", "2"], "--max-changed-share"),
        (["--held-out-share", "0"], "--held-out-share"),
        (["--tokenizer", "missing"], "--tokenizer missing"),
        (["--input", "el"], "LANG=FILE"),
        (["--input", "el=-"], "standard input"),
        (["--input", "en=en.jsonl"], "en"),
        (["--input", "el={tmp}/one.jsonl"], "--input el has too little text"),
        (["--input", "el={tmp}/bad.jsonl"], "bad.jsonl:1"),
        (["--original", "en={tmp}/none.jsonl"], "none.jsonl"),
        (["--save", "{tmp}/one.jsonl"], "already exists"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, extend, words, reason, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one.jsonl", ["Μία πρόταση."])
    write(tmp_path / "en.jsonl", ["x"])
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=reason):
        extend(tmp_path / "out", *(word.format(tmp=tmp_path) for word in words))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "en.jsonl", "one.jsonl"]


def test_a_link_out_of_the_old_tokenizers_folder_is_not_followed(tmp_path, extend, old_folders) -> None:
    old = Path(shutil.copytree(old_folders["qwen"], tmp_path / "old"))
    (tmp_path / "secret").write_text("hf_secret")
    (old / "chat_template.jinja").unlink()
    (old / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="chat_template.jinja is a link"):
        extend(tmp_path / "out", "--tokenizer", old)
    assert not (tmp_path / "out").exists()
