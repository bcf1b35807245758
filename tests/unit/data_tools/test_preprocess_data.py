"""JSON lines in, three files out: Megatron's bytes, the right bits, and one clear error for every kind of bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from data_tools import merge_data
from data_tools.corpus.corpus import Corpus
from data_tools.preprocessing import batches, job
from moelpr.base import journal
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.manifest import Manifest
from moelpr.data.text.reading import read_documents
from moelpr.data.tokenizers.loading import load_tokenizer

ONE = ("--language", "original", "--append-eod")
KEY = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod", "--json-keys", "text", "title")
GOOD = b'{"text": "Turn on the light.", "lang": "en"}\n'


@pytest.fixture
def corpus_lines(write_lines: Callable[..., Path], sentences: dict[str, str]) -> Callable[..., Path]:
    """Writes documents of all languages, one in four of them empty, with a title next to each text."""
    names = list(sentences)

    def write(name: str = "a.jsonl", documents: int = 60) -> Path:
        texts = [" ".join([sentences[names[i % 5]]] * (i % 4)) for i in range(documents)]
        return write_lines(
            name, [{"text": text, "title": f"title {i}", "lang": names[i % 5]} for i, text in enumerate(texts)]
        )

    return write


def test_bin_and_idx_are_the_bytes_megatron_writes(tokenizer, corpus_lines, preprocess, tmp_path) -> None:
    lines = corpus_lines()
    ours = Path(f"{preprocess(tokenizer, '--input', lines, *ONE)}_text_document")

    # Megatron's own tokenizer and builder, used as its tools/preprocess_data.py uses them.
    is_hf = tokenizer.is_dir()
    library = "huggingface" if is_hf else "sentencepiece"
    theirs = MegatronTokenizer.from_pretrained(tokenizer_path=str(tokenizer), metadata_path={"library": library})
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(theirs.vocab_size))
    eod = theirs.eod if is_hf else theirs._tokenizer.tokenizer.eos_id()
    for line in lines.read_text("utf-8").splitlines():
        ids = theirs.tokenize(json.loads(line)["text"])
        if ids:
            ids = [*ids, eod]
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))

    assert ours.with_suffix(".bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert ours.with_suffix(".idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("include", [True, False])
def test_special_tokens_around_a_text_are_megatrons(include: bool, hf_tokenizer: Path, sentences) -> None:
    words = {"metadata_path": {"library": "huggingface"}, "include_special_tokens": include}
    theirs = MegatronTokenizer.from_pretrained(tokenizer_path=str(hf_tokenizer), **words)
    ours = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))
    for text in (*sentences.values(), "", "a</s>b"):
        actual = ours.encode_whole(text) if include else ours.encode([text]).ids.tolist()
        assert actual == theirs.tokenize(text) and (actual[:1] == [0]) == include
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)


@pytest.mark.parametrize("num_shards", [2, 9])
def test_shards_merge_to_the_bytes_of_one_job(num_shards, hf_tokenizer, corpus_lines, preprocess, corpus_bytes) -> None:
    """Shards end inside lines and files; of 9 shards of 7 lines some are empty."""
    files = [corpus_lines("a.jsonl", 4), corpus_lines("b.jsonl", 3)]
    files[1].write_bytes(files[1].read_bytes().rstrip(b"\n"))
    one = preprocess(hf_tokenizer, "--input", *files, *KEY, out="one")
    for shard in range(num_shards):
        flags = (*KEY, "--num-shards", num_shards, "--shard", shard)
        many = preprocess(hf_tokenizer, "--input", *files, *flags, out="many")
    for key in ("text", "title"):
        prefix = f"{many}_{key}_document"
        call(merge_data.main, ["--output-prefix", prefix, "--num-shards", str(num_shards), "--remove-input"])
        assert corpus_bytes(prefix) == corpus_bytes(f"{one}_{key}_document")
    assert not list(many.parent.glob("*.shard-*"))


@pytest.mark.parametrize("change", ["input", "flag"])
def test_shards_of_different_jobs_are_not_joined(change, hf_tokenizer, corpus_lines, preprocess, tmp_path) -> None:
    """Documents between the two ends of the slices would be missing, or twice in the corpus."""
    lines = corpus_lines("a.jsonl", 10)
    flags = ("--input", lines, "--language", "original", "--num-shards", "2", "--shard")
    preprocess(hf_tokenizer, *flags, "0")
    elsewhere = tmp_path / "elsewhere" / "a.jsonl"  # as on another node
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(lines.read_bytes())
    prefix = preprocess(hf_tokenizer, "--input", elsewhere, *flags[2:], "1")
    words = ["--output-prefix", f"{prefix}_text_document", "--num-shards", "2"]
    call(merge_data.main, words)
    if change == "input":
        lines.write_bytes(lines.read_bytes() * 2)
    # Settings that change no finished shard may differ: the other jobs need not run again.
    preprocess(hf_tokenizer, *flags[:-1], "--on-error", "skip", "--shard", "1", "--overwrite")
    if change == "flag":
        call(merge_data.main, [*words, "--overwrite"])
        preprocess(hf_tokenizer, *flags, "1", "--validation-share", "0.5", "--overwrite")
    with pytest.raises(UserError, match="different jobs"):
        call(merge_data.main, [*words, "--overwrite"])


def test_shard_reports_a_bad_line_by_its_number_in_the_file(hf_tokenizer, corpus_lines, preprocess) -> None:
    lines = corpus_lines("a.jsonl", 40)
    content = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*content[:35], b"oops\n", *content[36:]]))
    flags = ("--input", lines, "--language", "original", "--num-shards", "4", "--shard")
    for shard in range(3):
        preprocess(hf_tokenizer, *flags, shard)
    with pytest.raises(UserError, match=r"a\.jsonl:36: not JSON"):
        preprocess(hf_tokenizer, *flags, 3)


def test_number_of_workers_changes_no_byte(sp_tokenizer, corpus_lines, preprocess, corpus_bytes, monkeypatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 500)  # some twenty batches, so that workers overtake each other
    words = ("--input", corpus_lines("a.jsonl"), corpus_lines("b.jsonl", 33), *KEY)
    one = preprocess(sp_tokenizer, *words, out="one", workers=1)
    three = preprocess(sp_tokenizer, *words, out="three", workers=3)
    assert corpus_bytes(f"{one}_text_document") == corpus_bytes(f"{three}_text_document")
    assert Corpus(f"{one}_text_document").num_documents == 93


def test_each_token_has_its_documents_bit(unigram_tokenizer, corpus_lines, preprocess, capsys) -> None:
    lines = corpus_lines()
    prefix = preprocess(unigram_tokenizer, "--input", lines, *KEY, "--expanded-languages", "el,hu,fr")
    for key in ("text", "title"):
        corpus = Corpus(f"{prefix}_{key}_document")
        corpus.bits.verify()
        assert 0 < corpus.bits.num_original < corpus.bits.num_tokens
        for index, line in enumerate(lines.read_text("utf-8").splitlines()):
            ids, bits = corpus.document(index)
            assert len(ids) > 0 or json.loads(line)[key] == ""
            assert set(bits.tolist()) <= {int(json.loads(line)["lang"] in ("en", "es", "zh"))}
    out = capsys.readouterr().out
    assert "note: no document is tagged fr" in out
    assert "note: 15 documents are empty" in out


@pytest.mark.parametrize(
    "line, message",
    [(b'{"text": "a"', "not JSON .* character 13"), (b'{"text": 1}', '"text" .* a number'), (b"[" * 100_000, "JSON")],
)
def test_bad_line_stops_the_job_with_its_number_or_is_skipped(
    line: bytes, message: str, sp_tokenizer: Path, preprocess: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # a blank line is neither a document nor an error
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}.*--on-error skip"):
        preprocess(sp_tokenizer, "--input", lines, *ONE)
    assert list((tmp_path / "out").iterdir()) == []

    prefix = preprocess(sp_tokenizer, "--input", lines, *ONE, "--on-error", "skip", "--max-bad-share", "0.5")
    assert Corpus(f"{prefix}_text_document").num_documents == 2
    assert "1 lines were skipped" in capsys.readouterr().err
    assert "a.jsonl:3: " in Path(f"{prefix}.skipped.txt").read_text()


def test_an_original_language_without_documents_is_rejected_except_in_a_shard(
    hf_tokenizer: Path, write_lines, preprocess, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    lines = write_lines("a.jsonl", [{"text": "a", "lang": "en"}, {"text": "b", "lang": "el"}])
    flags = ("--input", lines, "--language-key", "lang", "--original-languages", "english,en")
    with pytest.raises(UserError, match="english of --original-languages; found: el, en;"):
        preprocess(hf_tokenizer, *flags)
    assert list((tmp_path / "out").iterdir()) == []
    preprocess(hf_tokenizer, *flags, "--num-shards", "2", "--shard", "0")
    assert "note: no document is tagged english" in capsys.readouterr().out


def test_any_text_round_trips_and_empty_documents_are_kept(tokenizer: Path, write_lines, preprocess) -> None:
    """The document exists even if the tokenizer gives no tokens; SentencePiece's normalizes white space."""
    texts = [" ", "\n\n\t", "\u3000", "a", "", "x" * 100_000, "a\0b", "\0", "👩‍👩‍👧‍👦", "\ufeff", "\U0010ffff"]
    prefix = preprocess(tokenizer, "--input", write_lines("a.jsonl", [{"text": text} for text in texts]), *ONE)
    corpus = Corpus(f"{prefix}_text_document")
    assert corpus.num_documents == len(texts)
    if tokenizer.is_dir():
        decode = load_tokenizer("HuggingFaceTokenizer", str(tokenizer)).decode
        assert [decode(corpus.document(index)[0][1:-1].tolist()) for index in range(len(texts))] == texts


def test_malformed_lines_are_counted_and_all_listed(hf_tokenizer, preprocess, tmp_path, capsys) -> None:
    lines = [b"malformed %d" % i if i % 50 == 0 else b'{"text": "a"}' for i in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    flags = (*ONE, "--on-error", "skip", "--max-bad-share", "0.02")
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", *flags)
    manifest = Manifest.read(f"{prefix}_text_document")
    assert manifest is not None and (manifest.documents, manifest.skipped_lines) == (980, 20)
    listed = (tmp_path / "out" / "a.skipped.txt").read_text().splitlines()
    assert [int(line.split(":")[1]) for line in listed] == list(range(1, 1001, 50))
    error = capsys.readouterr().err
    assert "20 lines were skipped (2.00%)" in error and "  and 10 more" in error

    with pytest.raises(UserError, match="20 of 1,000 lines .*--max-bad-share 0.019"):
        flags = (*ONE, "--on-error", "skip", "--max-bad-share", "0.019")
        preprocess(hf_tokenizer, "--input", tmp_path / "a.jsonl", *flags, out="refused/a")
    assert list((tmp_path / "refused").iterdir()) == []


def test_validation_share_is_a_stable_fraction_of_the_documents(
    hf_tokenizer: Path, write_lines, preprocess, corpus_bytes, tmp_path: Path
) -> None:
    texts = [f"document {i % 1500}" for i in range(2000)]  # 500 of them twice
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    backwards = write_lines("b.jsonl", [{"text": text} for text in reversed(texts)])

    def parts(path: Path, seed: int, out: str) -> list[list[bytes]]:
        flags = (*ONE, "--validation-share", "0.1", "--seed", seed)
        prefix = preprocess(hf_tokenizer, "--input", path, *flags, out=out)
        corpora = [Corpus(f"{prefix}_{name}_document") for name in ("text", "validation_text")]
        return [[corpus.document(i)[0].tobytes() for i in range(corpus.num_documents)] for corpus in corpora]

    train, validation = parts(lines, 1, "one/a")
    assert len(train) + len(validation) == 2000 and 140 < len(validation) < 260
    assert not set(train) & set(validation)  # copies of a text are on one side
    assert parts(backwards, 1, "back/a") == [train[::-1], validation[::-1]]
    assert set(parts(lines, 2, "other/a")[1]) != set(validation)
    whole = preprocess(hf_tokenizer, "--input", lines, *ONE, out="whole/a")
    corpus = Corpus(f"{whole}_text_document")
    rest = iter([corpus.document(i)[0].tobytes() for i in range(2000)])
    assert [text for text in rest if text not in set(validation)] == train


@pytest.mark.parametrize("key", ["text", "content"])
def test_held_out_text_is_that_of_the_held_out_corpus_whatever_the_jobs(
    key, hf_tokenizer, sentences, write_lines, preprocess, corpus_bytes
) -> None:
    """One line per document that has text, as `moelpr evaluate --data` reads it; shards join to the same file."""
    rows = [
        {key: f'"{text}"\n\u2028{i}' if i % 7 else "", "lang": name}
        for i in range(50)
        for name, text in sentences.items()
    ]
    lines = write_lines("in/a.jsonl", rows)
    flags = ("--json-keys", key, "--language-key", "lang", "--original-languages", "en", "--validation-share", "0.3")
    one = preprocess(hf_tokenizer, "--input", lines, *flags, out="in/one")
    held_out = [json.loads(line) for line in Path(f"{one}_validation.jsonl").read_bytes().splitlines()]
    texts = read_documents(Path(f"{one}_validation.jsonl"))
    assert held_out == [{"text": row[key], "lang": row["lang"]} for row in rows if row[key] in set(texts)]
    assert Corpus(f"{one}_validation_{key}_document").num_documents >= len(held_out) > 40
    for shard in range(3):
        many = preprocess(hf_tokenizer, "--input", lines, *flags, "--num-shards", 3, "--shard", shard, out="in/many")
    corpus = f"{many}_validation_{key}_document"
    call(merge_data.main, ["--output-prefix", corpus, "--num-shards", "3", "--remove-input"])
    assert Path(f"{many}_validation.jsonl").read_bytes() == Path(f"{one}_validation.jsonl").read_bytes()
    assert not list(many.parent.glob("many_validation*shard*"))
    # In the folder of its input, it is no input; nor is it replaced by the way.
    again = preprocess(hf_tokenizer, "--input", lines.parent, *flags, out="again/one")
    assert corpus_bytes(f"{again}_validation_{key}_document") == corpus_bytes(f"{one}_validation_{key}_document")
    Path(f"{one}_validation_{key}_document.idx").unlink()
    for name in ("bin", "lang", "idx"):
        Path(f"{one}_{key}_document.{name}").unlink()
        Path(f"{one}_validation_{key}_document.{name}").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"one_validation\.jsonl already exists.*--overwrite"):
        preprocess(hf_tokenizer, "--input", lines, *flags, out="in/one")
    with pytest.raises(UserError, match=r"one_validation\.jsonl is an input"):
        preprocess(hf_tokenizer, "--input", f"{one}_validation.jsonl", *flags, "--overwrite", out="in/one")


def test_held_out_text_of_spans_is_their_joined_text_in_their_longest_language(hf_tokenizer, write_lines, preprocess):
    joined = "Turn on το φως της κουζίνας"
    spans = [{"text": joined[:8], "lang": "en"}, {"text": joined[8:], "lang": "el"}, {"text": "", "lang": "hu"}]
    lines = write_lines("a.jsonl", [{"spans": [*spans, {"text": f" {i}", "lang": "en"}]} for i in range(100)])
    flags = ("--spans-key", "spans", "--original-languages", "en", "--validation-share", "0.5")
    held_out = Path(f"{preprocess(hf_tokenizer, '--input', lines, *flags)}_validation.jsonl").read_bytes().splitlines()
    texts = [json.loads(line) for line in held_out]
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
        preprocess(path, "--input", tmp_path / lines, *flags, out=out)
    assert not [*tmp_path.glob("*.bin")]


@pytest.mark.parametrize(
    "code, flags, bit",
    [
        ("el", ["--original-languages", "en,es"], "expanded"),
        ("el", ["--expanded-languages", "el,hu"], "expanded"),
        ("en", ["--original-languages", "eng_Latn", "--expanded-languages", "el"], "original"),
    ],
)
def test_one_language_by_its_code_is_its_group_with_a_name(
    code, flags, bit, sp_tokenizer, corpus_lines, preprocess, corpus_bytes
) -> None:
    lines = corpus_lines()
    named = f"{preprocess(sp_tokenizer, '--input', lines, '--language', code, *flags, out='named/a')}_text_document"
    group = f"{preprocess(sp_tokenizer, '--input', lines, '--language', bit)}_text_document"
    assert corpus_bytes(named) == corpus_bytes(group)
    ours, theirs = Manifest.read(named), Manifest.read(group)
    assert ours.languages == {code: theirs.languages[bit]} and theirs.languages[bit].bit == bit
    assert Corpus(named).bits.num_original == (ours.tokens if bit == "original" else 0)


def test_documents_and_flags_may_name_a_language_by_any_of_its_codes(
    sp_tokenizer, sentences, write_lines, preprocess, corpus_bytes
) -> None:
    """As in FineWeb-2, whose column says ell_Grek; the manifest has one code for all."""
    rows = [{"text": f"{text} {i}", "lang": name} for i in range(5) for name, text in sentences.items()]
    other = {"en": "eng_Latn", "es": "spa", "zh": "cmn_Hani", "el": "ell_Grek", "hu": "hu"}
    flags = ("--language-key", "lang", "--original-languages", "en,es,zh", "--expanded-languages", "el,hu")
    one = preprocess(sp_tokenizer, "--input", write_lines("a.jsonl", rows), *flags)
    lines = write_lines("b.jsonl", [row | {"lang": other[row["lang"]]} for row in rows])
    flags = (*flags[:3], "eng,spa_Latn,zh-Hans", "--expanded-languages", "ell,hun")
    two = preprocess(sp_tokenizer, "--input", lines, *flags, out="out/b")
    assert corpus_bytes(f"{one}_text_document") == corpus_bytes(f"{two}_text_document")
    assert Manifest.read(f"{one}_text_document").languages == Manifest.read(f"{two}_text_document").languages


def test_full_disk_exits_with_code_1_and_leaves_nothing(
    sp_tokenizer, corpus_lines, preprocess, tmp_path, capsys, monkeypatch
) -> None:
    lines = corpus_lines("a.jsonl", 20_000)
    # The unfinished .bin links to a device that is always full.
    for module in (job, journal):
        monkeypatch.setattr(module, "empty", lambda folder: None)
    folder = tmp_path / "out" / ".a.unfinished"
    folder.mkdir(parents=True)
    (folder / "a_text_document.bin").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: preprocess(sp_tokenizer, "--input", lines, *ONE))
    assert exit.value.code == 1
    assert "disk is full" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
