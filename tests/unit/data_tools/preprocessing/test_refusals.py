"""Input that is no corpus is refused with its place and its key, before anything is written where that can be known."""

import bz2
import gzip
import io
import json
import lzma
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_tools.preprocessing import job
from moelpr.base.errors import UserError
from tests.support.packed_files import parquet_table, zstd

KEY = "--language-key lang --original-languages en,zh"
SPANS = "--spans-key spans --original-languages en,es,zh --expanded-languages el,hu"
ONE = "--language expanded"
SKIP = f"{ONE} --on-error skip"
BARE = "--tokenizer-hf-no-include-special-tokens"
GOOD = {"text": "Turn on the light.", "lang": "en"}
HALF = b'{"text": "a", "lang": "\\ud800"}'


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def spans(*content: Any) -> bytes:
    return lines({"spans": [*content]})


def table(content: dict[str, Any] | pyarrow.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    actual = content if isinstance(content, pyarrow.Table) else pyarrow.table(content)
    options |= {"write_page_checksum": True, "write_statistics": False}
    parquet.write_table(actual, file, compression="none", use_dictionary=False, **options)
    return file.getvalue()


MANY = lines(*[GOOD] * 61)
NO_TEXT = pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())
TWICE = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
LARGE = table({"text": [f"text {number}" * 20 for number in range(3000)]}, row_group_size=1000)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (lines(GOOD, {"text": "a"}), KEY, 'a:2: .*"lang" is missing'),
        (lines(GOOD, {"text": "a", "lang": 3}), KEY, 'a:2: .*"lang" .* 3'),
        (lines(GOOD, {"text": "a", "lang": "tr"}), f"{KEY} --expanded-languages el", 'a:2: .*"tr" .*--original-lang'),
        (HALF, KEY, 'a:1: the key "lang" contains half a surrogate pair'),
        (lines(GOOD), f"{KEY} --expanded-languages en", "en .*--original-languages and --expanded-languages"),
        (lines(GOOD), "--language hu --expanded-languages el", "--language hu is neither in"),
        (lines(GOOD), "--language kept --original-languages en", "excludes --original-languages"),
        (lines(GOOD), f"{ONE} --validation-share 1e-9", "validation_text_document .*--validation-share"),
        (lines(GOOD), f"{ONE} --json-keys meta/text", "--json-keys meta/text"),
        (lines(GOOD), f"{ONE} --output-prefix data/", "--output-prefix must end in a file name, such as data/el"),
        (lines(GOOD), f"{ONE} --validation-share 0.1 --json-keys text validation_text", "--json-keys .* one name"),
        (b"\n  \n", ONE, "a contains no documents"),
        (b"", ONE, "a contains no documents"),
        (lines({"text": ""}, {"text": ""}), f"{ONE} {BARE}", "a contains 2 documents without any text"),
        (b"x\ny\n", SKIP, "2 lines were skipped .*a:1: not JSON"),
        (b"x\n" + lines(*[GOOD] * 9), SKIP, "1 of 10 lines .*--max-bad-share 0.01 .*a:1: not JSON"),
        (lines({"text": "a"}), SPANS, 'a:1: the key "spans"'),
        (lines({"spans": "a"}), SPANS, 'a:1: the key "spans" .* a string, not a list'),
        (spans("a"), SPANS, 'a:1: span 1: a string, .* "text" and "lang"'),
        (spans(GOOD, {"text": "a"}), SPANS, 'a:1: span 2: the key "lang"'),
        (spans({"text": 1, "lang": "en"}), SPANS, 'a:1: span 1: the key "text"'),
        (spans({"text": "a", "lang": "tr"}), SPANS, 'a:1: span 1: the language "tr" .*--original-languages'),
        (spans(GOOD).replace(b'"lang"', b'"text": "x", "lang"'), SPANS, "a:1: .*text"),  # the first would be lost
        (gzip.compress(MANY, mtime=0)[:-20], ONE, r"a \(gzip\) is damaged or truncated"),
        (gzip.compress(MANY, mtime=0)[:-20], f"{SKIP} --max-bad-share 1", r"a \(gzip\)"),  # nobody knows how much
        (gzip.compress(MANY, mtime=0)[:60] + b"x" * 400, ONE, r"a \(gzip\) is damaged or truncated"),
        (zstd(MANY)[:-20], ONE, r"a \(zstd\) is damaged or truncated"),
        (bz2.compress(MANY)[:-20], ONE, r"a \(bzip2\) is damaged or truncated"),
        (bz2.compress(MANY) + b"BZx" + bz2.compress(MANY)[3:], ONE, r"a \(bzip2\) is damaged"),
        (lzma.compress(MANY), ONE, "a is packed with xz; .*--input -"),
        (parquet_table([GOOD])[:-20], ONE, r"a \(Parquet\) is damaged or truncated"),
        (table({"text": NO_TEXT}), SKIP, r"a \(Parquet\) is damaged or truncated .*utf-8"),
        (table({"text": ["on the"]}).replace(b"on the", b"in the", 1), ONE, r"a \(Parquet\) is damaged .*CRC"),
        (LARGE.replace(b"text 1500", b"text 1600", 1), f"{ONE} --workers 2", r"a \(Parquet\) is damaged"),
        (table(TWICE), ONE, "a has several columns text"),
        (parquet_table([GOOD] * 20 + [{"text": None, "lang": "en"}]), KEY, 'a, row 21: the key "text"'),
        *((MANY.decode().encode(form), ONE, f"a is {form.upper()}") for form in ("utf-16", "utf-16-be", "utf-32")),
        (MANY + bytes(100), ONE, "a:62: NUL bytes"),
        (b'[{"text": "a"}]', ONE, "a:1: .* a list"),
        (b'[\n{\n"text": "a"}]', ONE, "a:1: the start of an object or array of several lines; write one object per"),
        (b"version https://git-lfs.github.com/spec/v1\n", ONE, r"a is damaged, or only a pointer of Git LFS; .*pull"),
    ],
)
def test_nothing_is_written_of_what_is_no_corpus(content, flags, message, preprocess, tmp_path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess("--input", tmp_path / "a", *flags.split())
    assert not [*(tmp_path / "out").glob("*")]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (table({"body": ["b"]}), "b has no column text; its columns are body"),
        (table({"text": [1]}), "b has a column text of the type int64"),
        (table({"text": [["b"]]}), "b has a column text of the type list<element: string>"),
        (table({"text": ["b"], "score": ["high"]}), 'b, row 1: the key "score" contains a string, .* 0.5'),
        (b'{"body": "b"}\n', 'b:1: the key "text" is missing'),
        (gzip.compress(b'\n{"text": 5}\n', mtime=0), 'b:2: the key "text" contains a number'),
    ],
)
def test_a_file_unlike_the_others_is_found_before_the_work_starts(last, message, preprocess, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(table({"text": ["a"] * 9, "score": [1.0] * 9}))
    (tmp_path / "b").write_bytes(last)
    monkeypatch.setattr(job.Job, "write", lambda *_: pytest.fail("the work has started"))
    flags = ["--filter", "score > 0.5"] if b"score" in last else []
    with pytest.raises(UserError, match=message):
        preprocess("--input", tmp_path / "a", tmp_path / "b", *ONE.split(), *flags)
