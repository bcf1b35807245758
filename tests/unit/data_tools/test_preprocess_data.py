"""JSON lines in, three files out: Megatron's bytes, the right bits, and one sentence for every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_tools import merge_data, preprocess_data
from data_tools.corpus import Corpus, CorpusPaths
from data_tools.preprocessing import encoder, journal, readers
from moelpr.data.tokenizer import load_tokenizer
from moelpr.errors import UserError, run_command

SENTENCES = {
    "en": "Turn on the light in the kitchen.",
    "es": "Enciende la luz de la cocina, ¡por favor!",
    "zh": "打开厨房的灯。",
    "el": "Ανάψτε το φως στην κουζίνα.",
    "hu": "Kapcsolja fel a lámpát a konyhában.",
}


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that starts every text with <s>, as Llama's tokenizers do."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES.values()] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)  # some published files hold such a setting; nobody wants it here
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES.values()] * 5),
        model_prefix=str(prefix),
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def write_lines(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
    return path


def corpus_lines(path: Path, documents: int = 60) -> Path:
    """Documents of all languages, one of them empty, with Megatron-like titles beside the texts."""
    names = list(SENTENCES)
    rows = [
        {"text": " ".join([SENTENCES[names[i % 5]]] * (i % 4)), "title": f"title {i}", "lang": names[i % 5]}
        for i in range(documents)
    ]
    return write_lines(path, rows)


def preprocess(tokenizer: Path, *inputs: Path, out: Path, flags: str = "--language original --append-eod") -> None:
    kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
    words = ["--tokenizer-type", kind, "--tokenizer-model", str(tokenizer), "--output-prefix", str(out)]
    arguments = ["--input", *map(str, inputs), *words, *flags.split()]
    preprocess_data.main(arguments if "--workers" in flags else [*arguments, "--workers", "1"])


def files(prefix: Path | str) -> list[bytes]:
    return [path.read_bytes() for path in CorpusPaths.of(prefix)]


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_bin_and_idx_are_the_bytes_megatron_writes(
    kind: str, hf_tokenizer: Path, sp_tokenizer: Path, tmp_path: Path
) -> None:
    path = hf_tokenizer if kind == "hf" else sp_tokenizer
    lines = corpus_lines(tmp_path / "a.jsonl")
    preprocess(path, lines, out=tmp_path / "ours")

    # Megatron's own tokenizer and builder, used as its tools/preprocess_data.py uses them.
    library = "huggingface" if kind == "hf" else "sentencepiece"
    tokenizer = MegatronTokenizer.from_pretrained(tokenizer_path=str(path), metadata_path={"library": library})
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    eod = tokenizer.eod if kind == "hf" else tokenizer._tokenizer.tokenizer.eos_id()
    for line in lines.read_text("utf-8").splitlines():
        ids = tokenizer.tokenize(json.loads(line)["text"])
        if ids:
            ids = [*ids, eod]
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))

    ours = tmp_path / "ours_text_document"
    assert ours.with_suffix(".bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert ours.with_suffix(".idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    # Our reader sees what Megatron's sees.
    corpus, dataset = Corpus(ours), IndexedDataset(str(ours))
    np.testing.assert_array_equal(corpus.sequence_lengths, dataset.sequence_lengths)
    np.testing.assert_array_equal(corpus.document_starts, dataset.document_indices)
    np.testing.assert_array_equal(corpus.document(3)[0], dataset[corpus.document_starts[3]])


@pytest.mark.parametrize("num_shards", [2, 9])
def test_shards_merge_to_the_bytes_of_one_job(num_shards: int, hf_tokenizer: Path, tmp_path: Path) -> None:
    """Shards end inside lines and files; of 9 shards of 7 lines some are empty."""
    inputs = [corpus_lines(tmp_path / "a.jsonl", 4), corpus_lines(tmp_path / "b.jsonl", 3)]
    inputs[1].write_bytes(inputs[1].read_bytes().rstrip(b"\n"))
    flags = "--language-key lang --original-languages en,es,zh --append-eod --json-keys text title"
    preprocess(hf_tokenizer, *inputs, out=tmp_path / "one", flags=flags)
    for shard in range(num_shards):
        words = f"{flags} --num-shards {num_shards} --shard {shard} --workers 1"
        preprocess(hf_tokenizer, *inputs, out=tmp_path / "many", flags=words)
    for key in ("text", "title"):
        prefix = f"{tmp_path}/many_{key}_document"
        merge_data.main(["--output-prefix", prefix, "--num-shards", str(num_shards), "--remove-input"])
        assert files(prefix) == files(f"{tmp_path}/one_{key}_document")
    assert not list(tmp_path.glob("*.shard-*"))


def test_a_shard_names_a_bad_line_by_its_number_in_the_file(hf_tokenizer: Path, tmp_path: Path) -> None:
    lines = corpus_lines(tmp_path / "a.jsonl", 40)
    content = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*content[:35], b"oops\n", *content[36:]]))
    flags = "--language original --num-shards 4 --workers 1 --shard"
    for shard in range(3):
        preprocess(hf_tokenizer, lines, out=tmp_path / "out", flags=f"{flags} {shard}")
    with pytest.raises(UserError, match=r"a\.jsonl:36: not JSON"):
        preprocess(hf_tokenizer, lines, out=tmp_path / "out", flags=f"{flags} 3")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-shards 3", "--num-shards 3 needs --shard, 0 to 2"),
        ("--num-shards 3 --shard 3", "--shard 3 is none of the --num-shards 3, counted from 0"),
        ("--shard 1", "--shard 1 is none of the --num-shards 1, counted from 0"),
    ],
)
def test_a_shard_is_one_of_a_number(flags: str, said: str, hf_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        preprocess(
            hf_tokenizer, corpus_lines(tmp_path / "a.jsonl"), out=tmp_path / "o", flags=f"--language original {flags}"
        )


def test_special_tokens_around_a_text_follow_megatron_both_ways(hf_tokenizer: Path) -> None:
    texts = [*SENTENCES.values(), "", "a</s>b"]
    for include in (True, False):
        theirs = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(hf_tokenizer), metadata_path={"library": "huggingface"}, include_special_tokens=include
        )
        ours = load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer), include)
        assert ours.encode_batch(texts) == [theirs.tokenize(text) for text in texts]
        assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)
        assert (ours.encode_batch(["x"])[0][0] == 0) == include


def test_the_number_of_workers_changes_no_byte(
    sp_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 500)  # some twenty batches, so that workers overtake each other
    flags = "--language-key lang --original-languages en,es,zh"
    lines = [corpus_lines(tmp_path / "a.jsonl"), corpus_lines(tmp_path / "b.jsonl", 33)]
    preprocess(sp_tokenizer, *lines, out=tmp_path / "one", flags=f"{flags} --workers 1")
    preprocess(sp_tokenizer, *lines, out=tmp_path / "three", flags=f"{flags} --workers 3")
    assert files(tmp_path / "one_text_document") == files(tmp_path / "three_text_document")
    assert Corpus(tmp_path / "one_text_document").num_documents == 93


def test_each_token_has_its_documents_bit(sp_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = corpus_lines(tmp_path / "a.jsonl")
    flags = "--language-key lang --original-languages en,es,zh,fr --append-eod --json-keys text title"
    preprocess(sp_tokenizer, lines, out=tmp_path / "out", flags=flags)
    for key in ("text", "title"):
        corpus = Corpus(tmp_path / f"out_{key}_document")
        corpus.bits.verify()
        assert 0 < corpus.bits.num_original < corpus.bits.num_tokens
        for index, line in enumerate(lines.read_text("utf-8").splitlines()):
            ids, bits = corpus.document(index)
            assert len(ids) > 0 or json.loads(line)[key] == ""
            assert set(bits.tolist()) <= {int(json.loads(line)["lang"] in ("en", "es", "zh"))}
    out = capsys.readouterr().out
    assert "note: no document is tagged fr" in out
    assert "note: 15 documents are empty" in out


def test_one_language_tags_everything(sp_tokenizer: Path, tmp_path: Path) -> None:
    lines = corpus_lines(tmp_path / "a.jsonl")
    for language, share in (("original", 1), ("expanded", 0)):
        preprocess(sp_tokenizer, lines, out=tmp_path / language, flags=f"--language {language}")
        bits = Corpus(tmp_path / f"{language}_text_document").bits
        assert bits.num_tokens > 0
        assert bits.num_original == share * bits.num_tokens


GOOD = b'{"text": "Turn on the light.", "lang": "en"}\n'


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"a\.jsonl:3: not JSON \(Expecting ',' delimiter at character 13\)"),
        (b"[1]", r"a\.jsonl:3: a JSON object was expected, found a list"),
        (b'{"texts": "a"}', r'a\.jsonl:3: the key "text" is missing'),
        (b'{"text": 1}', r'a\.jsonl:3: the key "text" holds a number, not a string'),
        (b'{"text": null}', r'a\.jsonl:3: the key "text" holds null, not a string'),
        (b'{"text": "caf\xe9"}', r"a\.jsonl:3: invalid UTF-8 at byte 14 of the line"),
        (b'{"text": "\\ud800"}', r'a\.jsonl:3: the key "text" holds half a surrogate pair at character 1'),
        (b"[" * 100_000, r"a\.jsonl:3: not usable JSON"),
    ],
)
def test_a_bad_line_stops_with_its_place_or_is_counted(
    line: bytes, message: str, sp_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # a blank line is no document and no error
    with pytest.raises(UserError, match=message):
        preprocess(sp_tokenizer, lines, out=tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []

    flags = "--language original --on-error skip --max-bad-share 0.5"
    preprocess(sp_tokenizer, lines, out=tmp_path / "out" / "a", flags=flags)
    assert Corpus(tmp_path / "out" / "a_text_document").num_documents == 2
    assert "warning: 1 lines were skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, flags, message",
    [
        (b'{"text": "a"}', "", r'a\.jsonl:2: the language key "lang" is missing'),
        (b'{"text": "a", "lang": 3}', "", r'a\.jsonl:2: the language key "lang" holds 3, not a language'),
        (b'{"text": "a", "lang": "tr"}', "--expanded-languages el,hu", r'a\.jsonl:2: the language "tr" is neither in '),
    ],
)
def test_a_document_without_a_known_language_is_refused(
    line: bytes, flags: str, message: str, sp_tokenizer: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(GOOD + line + b"\n")
    with pytest.raises(UserError, match=message):
        flags = f"--language-key lang --original-languages en,zh {flags}"
        preprocess(sp_tokenizer, lines, out=tmp_path / "a", flags=flags)


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (b"", "", r"a\.jsonl holds no documents; nothing was written"),
        (b"\n  \n", "", r"a\.jsonl holds no documents"),
        (b'{"text": ""}\n' * 2, "", r"a\.jsonl holds 2 documents without any text"),
        (b"x\ny\n", "--on-error skip", r"no usable document, 2 lines were skipped \(first: \S*a\.jsonl:1: not JSON"),
    ],
)
def test_a_corpus_without_tokens_is_refused(
    content: bytes, flags: str, message: str, sp_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess(sp_tokenizer, tmp_path / "a.jsonl", out=tmp_path / "out" / "a", flags=f"--language original {flags}")
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_files_are_told_before_any_work(sp_tokenizer: Path, hf_tokenizer: Path, tmp_path: Path) -> None:
    lines = corpus_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"the input \S*none\.jsonl can't be read \(No such file"):
        preprocess(sp_tokenizer, lines, tmp_path / "none.jsonl", out=tmp_path / "a")
    (tmp_path / "no corpus").mkdir()
    with pytest.raises(UserError, match=r"the folder \S*/no corpus holds no .jsonl, "):
        preprocess(sp_tokenizer, tmp_path / "no corpus", out=tmp_path / "a")
    with pytest.raises(UserError, match="no tokenizer can be loaded from .*; .* a SentencePiece .model file"):
        preprocess(tmp_path / "none.model", lines, out=tmp_path / "a")
    broken = tmp_path / "tokenizer"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    for folder in (broken, tmp_path / "none"):
        with pytest.raises(UserError, match="no tokenizer can be loaded from .*; .* a folder with tokenizer.json"):
            preprocess(folder, lines, out=tmp_path / "a")
    with pytest.raises(UserError, match="the output folder .* can't be made"):
        preprocess(sp_tokenizer, lines, out=lines / "a")


def test_append_eod_needs_such_a_token(hf_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_bytes((hf_tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="--append-eod needs an end-of-document token, but .*tok has none"):
        preprocess(tmp_path / "tok", corpus_lines(tmp_path / "a.jsonl"), out=tmp_path / "a")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--language-key lang", "--language-key needs --original-languages"),
        ("--language original --original-languages en", "need --language-key"),
        ("--language-key lang --original-languages en,el --expanded-languages el", "el can't be both"),
        ("--language original --workers 0", "--workers 0 must be at least 1"),
        ("--language original --json-keys text text", "names a key twice"),
    ],
)
def test_flags_that_contradict_each_other_stop_the_run(
    flags: str, message: str, sp_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        preprocess(sp_tokenizer, corpus_lines(tmp_path / "a.jsonl"), out=tmp_path / "a", flags=flags)


@pytest.mark.parametrize("flags", ["", "--language original --language-key lang --original-languages en"])
def test_the_language_bit_is_stated_exactly_once(
    flags: str, sp_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit:
        preprocess(sp_tokenizer, corpus_lines(tmp_path / "a.jsonl"), out=tmp_path / "a", flags=flags)
    assert exit.value.code == 2
    assert "--language" in capsys.readouterr().err


def test_an_existing_corpus_is_replaced_only_with_overwrite(sp_tokenizer: Path, tmp_path: Path) -> None:
    lines = corpus_lines(tmp_path / "a.jsonl")
    preprocess(sp_tokenizer, lines, out=tmp_path / "a", flags="--language original")
    before = files(tmp_path / "a_text_document")
    with pytest.raises(UserError, match=r"a_text_document\.bin, .* exists already; .* pass --overwrite"):
        preprocess(sp_tokenizer, lines, out=tmp_path / "a", flags="--language expanded")
    assert files(tmp_path / "a_text_document") == before
    preprocess(sp_tokenizer, lines, out=tmp_path / "a", flags="--language expanded --overwrite")
    after = files(tmp_path / "a_text_document")
    assert after[:2] == before[:2] and after[2] != before[2]


def test_a_full_disk_ends_with_code_1_and_leaves_nothing(
    sp_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lines = corpus_lines(tmp_path / "a.jsonl", 20_000)
    # The real thing: the unfinished .bin leads to the device that is always full.
    monkeypatch.setattr(journal, "empty", lambda folder: None)
    (out / ".a.unfinished").mkdir()
    (out / ".a.unfinished" / "a_text_document.bin").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: preprocess(sp_tokenizer, lines, out=out / "a"))
    assert exit.value.code == 1
    assert "the disk is full" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_killed_worker_is_told_and_leaves_nothing(
    sp_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.Encoder, "encode", lambda self, batch: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match="a worker process was killed"):
        preprocess(sp_tokenizer, corpus_lines(tmp_path / "a.jsonl"), out=tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_ends_with_code_2_and_one_sentence(sp_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n")
    command = [sys.executable, preprocess_data.__file__, "--input", "a.jsonl", "--output-prefix", "out/a"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(sp_tokenizer)]
    done = subprocess.run([*command, "--language", "original"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    [note, sentence] = done.stderr.splitlines()
    assert note.startswith(
        "note: tokenizing with sentencepiece, not gigatoken: it does not support this tokenizer (only"
    )
    assert sentence.startswith("preprocess_data.py: error: a.jsonl:2: not JSON (")
    assert list((tmp_path / "out").iterdir()) == []
