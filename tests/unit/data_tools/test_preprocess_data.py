"""JSON lines in, three files out: Megatron's bytes, the right bits, and one clear error for every kind of bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from data_tools import merge_data
from data_tools.preprocessing import batches, job
from moelpr.base import journal
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.text.reading import read_documents
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.unit.data_tools.conftest import SENTENCES, documents

ONE = ("--language", "original", "--append-eod")
KEY = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod", "--json-keys", "text", "title")
GOOD = b'{"text": "Turn on the light.", "lang": "en"}\n'


def merge(prefix: str, shards: int, *flags: str) -> None:
    call(merge_data.main, ["--output-prefix", prefix, "--num-shards", str(shards), *flags])


@pytest.mark.parametrize("special", [{}, {"include_special_tokens": False}])
def test_bin_and_idx_are_the_bytes_megatron_writes(special, tokenizer: Path, preprocess, tmp_path: Path) -> None:
    texts = [document["text"] for document in (*documents(), {"text": "a</s>b"})]
    flags = (*ONE, *(["--tokenizer-hf-no-include-special-tokens"] if special else []))
    ours = preprocess([{"text": text} for text in texts], *flags, tokenizer=tokenizer).content()

    # Megatron's own tokenizer and builder, used as its tools/preprocess_data.py uses them.
    is_hf = tokenizer.is_dir()
    words = {"metadata_path": {"library": "huggingface" if is_hf else "sentencepiece"}} | (special if is_hf else {})
    theirs = MegatronTokenizer.from_pretrained(tokenizer_path=str(tokenizer), **words)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(theirs.vocab_size))
    eod = theirs.eod if is_hf else theirs._tokenizer.tokenizer.eos_id()
    for text in texts:
        ids = theirs.tokenize(text)
        if ids:
            ids = [*ids, eod]
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert ours[:2] == [(tmp_path / f"theirs.{suffix}").read_bytes() for suffix in ("bin", "idx")]


@pytest.mark.parametrize("num_shards", [2, 9])
def test_shards_merge_to_the_bytes_of_one_job(num_shards: int, write_lines, preprocess) -> None:
    """Shards end inside lines and files; of 9 shards of 7 lines some are empty."""
    files = [write_lines("a.jsonl", documents(4)), write_lines("b.jsonl", documents(3))]
    files[1].write_bytes(files[1].read_bytes().rstrip(b"\n"))
    one = preprocess("--input", *files, *KEY, out="one")
    for shard in range(num_shards):
        many = preprocess("--input", *files, *KEY, "--num-shards", num_shards, "--shard", shard, out="many")
    for key in ("text", "title"):
        merge(many.path(key), num_shards, "--remove-input")
        assert many.content(key) == one.content(key)
    assert not list(many.prefix.parent.glob("*.shard-*"))


@pytest.mark.parametrize("change", ["input", "flag"])
def test_shards_of_different_jobs_are_not_joined(change: str, write_lines, preprocess) -> None:
    """Documents between the two ends of the slices would be missing, or twice in the corpus."""
    lines = write_lines("a.jsonl", documents(10))
    elsewhere = write_lines("elsewhere/a.jsonl", documents(10))  # as on another node
    flags = ("--language", "original", "--num-shards", "2", "--shard")
    preprocess("--input", lines, *flags, "0")
    made = preprocess("--input", elsewhere, *flags, "1").path()
    merge(made, 2)
    if change == "input":
        lines.write_bytes(lines.read_bytes() * 2)
    # Settings that change no finished shard may differ: the other jobs need not run again.
    flags = ("--input", lines, *flags, "1", "--overwrite")
    preprocess(*flags, "--on-error", "skip")
    if change == "flag":
        merge(made, 2, "--overwrite")
        preprocess(*flags, "--validation-share", "0.5")
    with pytest.raises(UserError, match="different jobs"):
        merge(made, 2, "--overwrite")


def test_shard_reports_a_bad_line_by_its_number_in_the_file(write_lines, preprocess) -> None:
    lines = write_lines("a.jsonl", documents(40))
    content = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*content[:35], b"oops\n", *content[36:]]))
    flags = ("--input", lines, "--language", "original", "--num-shards", "4", "--shard")
    for shard in range(3):
        preprocess(*flags, shard)
    with pytest.raises(UserError, match=r"a\.jsonl:36: not JSON"):
        preprocess(*flags, 3)


def test_number_of_workers_changes_no_byte(sp_tokenizer: Path, preprocess, monkeypatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 500)  # some twenty batches, so that workers overtake each other
    one, three = (preprocess(documents(93), *KEY, tokenizer=sp_tokenizer, out=f"{n}", workers=n) for n in (1, 3))
    assert one.content() == three.content() and one.corpus().num_documents == 93


def test_each_token_has_its_documents_bit(unigram_tokenizer: Path, preprocess, capsys) -> None:
    made = preprocess(documents(), *KEY, "--expanded-languages", "el,hu,fr", tokenizer=unigram_tokenizer)
    for key in ("text", "title"):
        corpus = made.corpus(key)
        corpus.bits.verify()
        assert 0 < corpus.bits.num_original < corpus.bits.num_tokens
        for index, document in enumerate(documents()):
            ids, bits = corpus.document(index)
            assert len(ids) > 0 or document[key] == ""
            assert set(bits.tolist()) <= {int(document["lang"] in ("en", "es", "zh"))}
    out = capsys.readouterr().out
    assert "note: no document is tagged fr" in out
    assert "note: 15 documents are empty" in out


@pytest.mark.parametrize(
    "line, message",
    [(b'{"text": "a"', "not JSON .* character 13"), (b'{"text": 1}', '"text" .* a number'), (b"[" * 100_000, "JSON")],
)
def test_bad_line_stops_the_job_with_its_number(line: bytes, message: str, preprocess, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # a blank line is no error
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}.*--on-error skip"):
        preprocess("--input", lines, *ONE)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_original_language_without_documents_is_rejected_except_in_a_shard(preprocess, capsys, tmp_path) -> None:
    rows = [{"text": "a", "lang": "en"}, {"text": "b", "lang": "el"}]
    flags = ("--language-key", "lang", "--original-languages", "english,en")
    with pytest.raises(UserError, match="english of --original-languages; found: el, en;"):
        preprocess(rows, *flags)
    assert list((tmp_path / "out").iterdir()) == []
    preprocess(rows, *flags, "--num-shards", "2", "--shard", "0")
    assert "note: no document is tagged english" in capsys.readouterr().out


def test_any_text_round_trips_and_empty_documents_are_kept(tokenizer: Path, preprocess) -> None:
    """The document exists even if the tokenizer gives no tokens; SentencePiece's normalizes white space."""
    texts = [" ", "\n\n\t", "\u3000", "a", "", "x" * 100_000, "a\0b", "\0", "👩‍👩‍👧‍👦", "\ufeff", "\U0010ffff"]
    corpus = preprocess([{"text": text} for text in texts], *ONE, tokenizer=tokenizer).corpus()
    assert corpus.num_documents == len(texts)
    if tokenizer.is_dir():
        decode = load_tokenizer("HuggingFaceTokenizer", str(tokenizer)).decode
        assert [decode(corpus.document(index)[0][1:-1].tolist()) for index in range(len(texts))] == texts


def test_malformed_lines_are_counted_and_all_listed(preprocess, tmp_path, capsys) -> None:
    lines = [b"malformed %d" % i if i % 50 == 0 else b'{"text": "a"}' for i in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    flags = ("--input", tmp_path / "a.jsonl", *ONE, "--on-error", "skip", "--max-bad-share")
    manifest = preprocess(*flags, "0.02").manifest()
    assert (manifest.documents, manifest.skipped_lines) == (980, 20)
    listed = (tmp_path / "out" / "a.skipped.txt").read_text().splitlines()
    assert [int(line.split(":")[1]) for line in listed] == list(range(1, 1001, 50))
    error = capsys.readouterr().err
    assert "20 lines were skipped (2.00%)" in error and "  and 10 more" in error

    with pytest.raises(UserError, match="20 of 1,000 lines .*--max-bad-share 0.019"):
        preprocess(*flags, "0.019", out="refused/a")
    assert list((tmp_path / "refused").iterdir()) == []


def test_validation_share_is_a_stable_fraction_of_the_documents(preprocess) -> None:
    rows = [{"text": f"document {i % 1500}"} for i in range(2000)]  # 500 of them twice

    def parts(rows: list[Any], *flags: Any) -> list[list[bytes]]:
        made = preprocess(rows, *ONE, *flags, "--overwrite")
        corpora = [made.corpus(name) for name in ("text", *(["validation_text"] if flags else []))]
        return [[corpus.document(i)[0].tobytes() for i in range(corpus.num_documents)] for corpus in corpora]

    flags = ("--validation-share", "0.1", "--seed")
    train, validation = parts(rows, *flags, 1)
    assert len(train) + len(validation) == 2000 and 140 < len(validation) < 260
    assert not set(train) & set(validation)  # copies of a text are on one side
    assert parts(rows[::-1], *flags, 1) == [train[::-1], validation[::-1]]
    assert set(parts(rows, *flags, 2)[1]) != set(validation)
    [whole] = parts(rows)
    assert [text for text in whole if text not in set(validation)] == train


@pytest.mark.parametrize("key", ["text", "content"])
def test_held_out_text_is_that_of_the_held_out_corpus_whatever_the_jobs(key: str, write_lines, preprocess) -> None:
    """One line per document that has text, as `moelpr evaluate --data` reads it; shards join to the same file."""
    languages = SENTENCES.items()
    rows = [{key: f'"{text}"\n\u2028{i}' if i % 7 else "", "lang": name} for i in range(50) for name, text in languages]
    lines, held = write_lines("in/a.jsonl", rows), f"validation_{key}"
    flags = ("--json-keys", key, "--language-key", "lang", "--original-languages", "en", "--validation-share", "0.3")
    one = preprocess("--input", lines, *flags, out="in/one")
    text = Path(f"{one.prefix}_validation.jsonl")
    held_out, texts = [json.loads(line) for line in text.read_bytes().splitlines()], {*read_documents(text)}
    assert held_out == [{"text": row[key], "lang": row["lang"]} for row in rows if row[key] in texts]
    assert one.corpus(held).num_documents >= len(held_out) > 40
    for shard in range(3):
        many = preprocess("--input", lines, *flags, "--num-shards", 3, "--shard", shard, out="in/many")
    merge(many.path(held), 3, "--remove-input")
    assert Path(f"{many.prefix}_validation.jsonl").read_bytes() == text.read_bytes()
    assert not list(lines.parent.glob("many_validation*shard*"))
    # In the folder of its input, it is no input; nor is it replaced by the way.
    assert preprocess("--input", lines.parent, *flags, out="again/one").content(held) == one.content(held)
    for path in lines.parent.glob(f"one_*{key}_document.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"one_validation\.jsonl already exists.*--overwrite"):
        preprocess("--input", lines, *flags, out="in/one")
    with pytest.raises(UserError, match=r"one_validation\.jsonl is an input"):
        preprocess("--input", text, *flags, "--overwrite", out="in/one")


def test_held_out_text_of_spans_is_their_joined_text_in_their_longest_language(preprocess) -> None:
    joined = "Turn on το φως της κουζίνας"
    spans = [{"text": joined[:8], "lang": "en"}, {"text": joined[8:], "lang": "el"}, {"text": "", "lang": "hu"}]
    rows = [{"spans": [*spans, {"text": f" {i}", "lang": "en"}]} for i in range(100)]
    made = preprocess(rows, "--spans-key", "spans", "--original-languages", "en", "--validation-share", "0.5")
    texts = [json.loads(line) for line in Path(f"{made.prefix}_validation.jsonl").read_bytes().splitlines()]
    assert all(text == {"text": f"{joined} {text['text'].split()[-1]}", "lang": "el"} for text in texts)
    assert 30 < len(texts) < 70


@pytest.mark.parametrize(
    ("tokenizer", "lines", "out", "message"),
    [
        ("hf", "none.jsonl", "a", r"none\.jsonl .*No such file"),
        ("hf", "empty", "a", r"empty contains no .jsonl, "),
        ("none.model", "a.jsonl", "a", r"none\.model.*--tokenizer-model"),
        ("none", "a.jsonl", "a", "no tokenizer folder .*none.*hf download"),
        ("broken", "a.jsonl", "a", r"tokenizer\.json: model is missing; download"),
        ("no end", "a.jsonl", "a", "--append-eod .*no end has none.*--eod-token"),
        ("no tokens", "a.jsonl", "a", r"--tokenizer-model \S*no tokens .* 3 documents of \S*a\.jsonl"),
        ("hf", "a.jsonl", "a.jsonl/a", r"write to the folder \S*a\.jsonl \("),
    ],
)
def test_wrong_files_and_tokenizers_are_named(tokenizer, lines, out, message, hf_tokenizer, preprocess, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 2 + b'{"text": ""}\n')
    for name in ("empty", "broken", "no end"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    shutil.copy(hf_tokenizer / "tokenizer.json", tmp_path / "no end")
    (tmp_path / "no end" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    PreTrainedTokenizerFast(tokenizer_object=RustTokenizer(BPE())).save_pretrained(tmp_path / "no tokens")
    path = hf_tokenizer if tokenizer == "hf" else tmp_path / tokenizer
    flags = ONE[:2] if tokenizer == "no tokens" else ONE
    with pytest.raises(UserError, match=message):
        preprocess("--input", tmp_path / lines, *flags, tokenizer=path, out=out)
    assert not [*tmp_path.glob("*.bin")]


@pytest.mark.parametrize(
    "code, flags, bit",
    [
        ("el", ["--original-languages", "en,es"], "expanded"),
        ("el", ["--expanded-languages", "el,hu"], "expanded"),
        ("en", ["--original-languages", "eng_Latn", "--expanded-languages", "el"], "original"),
    ],
)
def test_one_language_by_its_code_is_its_group_with_a_name(code: str, flags: list[str], bit: str, preprocess) -> None:
    named = preprocess(documents(), "--language", code, *flags, out="named/a")
    group = preprocess(documents(), "--language", bit)
    assert named.content() == group.content()
    ours, theirs = named.manifest(), group.manifest()
    assert ours.languages == {code: theirs.languages[bit]} and theirs.languages[bit].bit == bit
    assert named.corpus().bits.num_original == (ours.tokens if bit == "original" else 0)


def test_documents_and_flags_may_name_a_language_by_any_of_its_codes(preprocess) -> None:
    """As in FineWeb-2, whose column says ell_Grek; the manifest has one code for all."""
    rows = [{"text": f"{text} {i}", "lang": name} for i in range(5) for name, text in SENTENCES.items()]
    other = {"en": "eng_Latn", "es": "spa", "zh": "cmn_Hani", "el": "ell_Grek", "hu": "hu"}
    flags = ("--language-key", "lang", "--original-languages", "en,es,zh", "--expanded-languages", "el,hu")
    one = preprocess(rows, *flags)
    flags = (*flags[:3], "eng,spa_Latn,zh-Hans", "--expanded-languages", "ell,hun")
    two = preprocess([row | {"lang": other[row["lang"]]} for row in rows], *flags, out="out/b")
    assert one.content() == two.content() and one.manifest().languages == two.manifest().languages


def test_full_disk_exits_with_code_1_and_leaves_nothing(preprocess: Callable, tmp_path, capsys, monkeypatch) -> None:
    # The unfinished .bin links to a device that is always full.
    for module in (job, journal):
        monkeypatch.setattr(module, "empty", lambda folder: None)
    folder = tmp_path / "out" / ".a.unfinished"
    folder.mkdir(parents=True)
    (folder / "a_text_document.bin").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: preprocess(documents(20_000), *ONE))
    assert exit.value.code == 1
    assert "disk is full" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
