"""Text at URIs: a data set in FineWeb-2's layout gives the same corpus from every place, whatever the network does."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from data_tools import merge_data, preprocess_data
from data_tools.preprocessing import job
from moelpr.base.errors import MachineError, UserError
from moelpr.data.manifest import Manifest
from moelpr.data.text import remote
from moelpr.data.text.estimate import estimate
from moelpr.data.text.reading import read_documents
from moelpr.data.text.tables import prepare_to_fork
from moelpr.project.file import found_text, versions
from tests.support.text_server import COMMIT, TextServer, text_server

WAYS = ("http", "s3", "hf")
FOLDER = "data/ell_Grek"
KEYS = ("--language-key", "language", "--original-languages", "en", "--expanded-languages", "el", "--append-eod")
ROWS, ROWS_IN_GROUP = 2500, 1000  # FineWeb-2's row groups have 1,000 rows


def fineweb_2(first: int, count: int, text: str) -> pyarrow.Table:
    """Rows with FineWeb-2's columns and types."""
    numbers = range(first, first + count)
    columns = {
        "text": [f"{text} {number}. " * (1 + number % 7) for number in numbers],
        "id": [f"<urn:uuid:{number:08x}>" for number in numbers],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.com/{number}" for number in numbers],
        "date": ["2024-02-25T10:00:00Z"] * count,
        "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * count,
        "language": ["ell"] * count,
        "language_score": [1 - number / 10_000 for number in numbers],
        "language_script": ["Grek"] * count,
        "minhash_cluster_size": [number % 9 for number in numbers],
        "top_langs": ['{"ell_Grek_score": 0.99}'] * count,
    }
    return pyarrow.table(columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentences: dict[str, str]) -> Path:
    """What is served: the data set, and its training text as JSON lines, plain and packed."""
    top = tmp_path_factory.mktemp("served")

    def write(path: str, table: pyarrow.Table) -> None:
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, top / path, row_group_size=ROWS_IN_GROUP)

    for number in range(2):
        write(f"{FOLDER}/train/{number:03}_00000.parquet", fineweb_2(number * ROWS, ROWS, sentences["el"]))
    write(f"{FOLDER}/test/000_00000.parquet", fineweb_2(0, 9, "held out"))
    write(f"{FOLDER}_removed/train/000_00000.parquet", fineweb_2(0, 9, "removed"))
    rows = [row for number in range(2) for row in fineweb_2(number * ROWS, ROWS, sentences["el"]).to_pylist()]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    packed = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
    }
    for suffix, content in packed.items():
        (top / suffix).mkdir()
        (top / suffix / f"el.{suffix}").write_bytes(content)
    return top


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[TextServer]:
    with text_server(folder) as server:
        yield server


@pytest.fixture
def server(running: TextServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextServer]:
    """The server as the libraries find it, with nothing that they have kept from another test."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(remote, "_WAITS_S", (0.01, 0.01, 0.01, 0.01))
    running.fail("", 0)
    running.requests()
    yield running
    prepare_to_fork()


@pytest.fixture(scope="module")
def expected(folder, hf_tokenizer, tmp_path_factory) -> list[bytes]:
    """The corpus of the local folder."""
    out = tmp_path_factory.mktemp("local") / "a"
    preprocess_data.main([*map(str, ("--input", folder / FOLDER, *flags(hf_tokenizer), "--output-prefix", out))])
    return [Path(f"{out}_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx", "lang")]


def flags(tokenizer: Path) -> list[str]:
    return [*KEYS, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--workers", "1"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_corpus_of_the_local_folder(
    way, server, expected, hf_tokenizer, preprocess, corpus_bytes
) -> None:
    uri = server.uri(way, FOLDER + "/" * (way == "http"))
    out = preprocess(hf_tokenizer, "--input", uri, *KEYS, workers=2)
    assert corpus_bytes(f"{out}_text_document") == expected
    text = Path(f"{out}_text_document.manifest.json").read_text("utf-8")
    manifest = Manifest.read(f"{out}_text_document")
    assert manifest is not None
    assert manifest.languages.keys() == {"el"}  # the documents' own column, by its code
    assert [source.documents for source in manifest.sources] == [ROWS, ROWS]
    assert all(source.bytes and source.version and "/train/" in source.path for source in manifest.sources)
    assert (COMMIT in manifest.sources[0].path) == (way == "hf")
    assert "hidden" not in text


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_lines_and_archives_are_read_by_pattern(
    suffix, server, expected, hf_tokenizer, preprocess, corpus_bytes
) -> None:
    out = preprocess(hf_tokenizer, "--input", server.uri("s3", f"{suffix}/*.{suffix}"), *KEYS)
    assert corpus_bytes(f"{out}_text_document") == expected


@pytest.mark.parametrize("path", ["jsonl/el.jsonl", f"{FOLDER}/"])
def test_shards_of_remote_files_merge_to_the_bytes_of_one_job(
    path, server, expected, hf_tokenizer, preprocess, corpus_bytes
) -> None:
    for shard in range(3):
        many = preprocess(
            hf_tokenizer, "--input", server.uri("http", path), *KEYS, "--num-shards", "3", "--shard", str(shard)
        )
    merge_data.main(["--output-prefix", f"{many}_text_document", "--num-shards", "3"])
    assert corpus_bytes(f"{many}_text_document") == expected


@pytest.mark.parametrize("kind", ["cut", "503", "500"])
@pytest.mark.parametrize("way", WAYS)
def test_what_may_pass_is_tried_again(way, kind, server, monkeypatch) -> None:
    """Connections that end in the midst of a range, throttling and failing servers."""
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    uri = remote.pinned(server.uri(way, "jsonl/el.jsonl"))
    identity = remote.identify(uri)
    server.fail(kind, times=2, after=100)
    with remote.RemoteFile(uri, identity) as file:
        file.seek(100)
        assert file.read() == (server.folder / "jsonl/el.jsonl").read_bytes()[100:]
    if kind == "503" and way == "http":
        assert waited == [1, 1]  # as Retry-After says


@pytest.mark.parametrize("way", WAYS)
def test_a_job_whose_login_expires_goes_on_where_it_was(
    way, server, expected, hf_tokenizer, preprocess, corpus_bytes, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(remote, "_FIRST_RANGE", 1 << 14)
    monkeypatch.setattr(remote, "_LARGEST_RANGE", 1 << 15)
    words = ("--input", server.uri(way, "jsonl/el.jsonl"), *KEYS, "--resume", "--tokenizer-backend", "reference")
    server.fail("403", times=99, after=200_000)
    monkeypatch.setattr("data_tools.preprocessing.batches.BATCH_BYTES", 1 << 13)
    with pytest.raises(MachineError, match="403.*--resume"):
        preprocess(hf_tokenizer, *words)
    server.fail("", 0)
    capsys.readouterr()
    out = preprocess(hf_tokenizer, *words)
    assert corpus_bytes(f"{out}_text_document") == expected
    resumed = re.search(r"resuming after ([\d,]+) bytes", capsys.readouterr().err)
    assert resumed is not None and int(resumed[1].replace(",", "")) > 100_000


@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_remote_file_that_changes_is_noticed(is_resumed, server, hf_tokenizer, preprocess, monkeypatch) -> None:
    file = server.folder / "changing.jsonl"
    file.write_bytes((server.folder / "jsonl/el.jsonl").read_bytes())
    words = ("--input", server.uri("http", "changing.jsonl"), *KEYS, "--resume", "--tokenizer-backend", "reference")
    monkeypatch.setattr(remote, "_FIRST_RANGE", 1 << 14)
    monkeypatch.setattr("data_tools.preprocessing.batches.BATCH_BYTES", 1 << 13)
    if is_resumed:
        server.fail("403", times=99, after=100_000)
        with pytest.raises(MachineError):
            preprocess(hf_tokenizer, *words)
        server.fail("", 0)
        file.write_bytes(file.read_bytes() + b"\n")
        with pytest.raises(UserError, match=r"different input files \(http.*/changing.jsonl\)"):
            preprocess(hf_tokenizer, *words)
        return
    identify = remote.identify

    def changing(uri: str, refresh: bool = False) -> remote.Identity:
        found = identify(uri, refresh)
        file.write_bytes(b"{}" + file.read_bytes()[2:])
        return found

    monkeypatch.setattr(remote, "identify", changing)
    with pytest.raises(UserError, match=r"changing.jsonl has changed"):
        preprocess(hf_tokenizer, *words)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://datasets/owner/gated/x.parquet", "needs another login than yours.*hf auth login"),
        ("hf://datasets/owner/absent/x.parquet", "hf://datasets/owner/absent/x.parquet"),
        ("hf://datasets/owner/name@gone/x.parquet", "revision .* does not exist"),
        ("hf://datasets/owner/name/none.parquet", "there is no hf://.*none.parquet"),
        ("s3://bucket/none.parquet", "there is no s3://bucket/none.parquet"),
        ("{http}/none.parquet?signature=hidden", "there is no http.*/none.parquet; "),
        ("http://user:hidden@localhost/a.jsonl", "contains a login.*netrc"),
        ("http://127.0.0.1:9/a.jsonl", "can't be read .*check the address"),
        ("{http}/jsonl/*.none", "no file matches"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(uri, message, server, hf_tokenizer, preprocess) -> None:
    with pytest.raises(UserError, match=message) as error:
        preprocess(hf_tokenizer, "--input", uri.format(http=f"{server.address}/files"), *KEYS)
    assert "hidden" not in str(error.value)


def test_a_network_that_stays_away_is_one_sentence_without_secrets(server) -> None:
    uri = server.uri("http", "jsonl/el.jsonl?signature=hidden")
    identity = remote.identify(uri)
    server.fail("500", times=99)
    with remote.RemoteFile(uri, identity) as file, pytest.raises(MachineError, match="HTTP status 500") as error:
        file.read()
    assert "hidden" not in str(error.value)


def test_a_filter_keeps_the_same_rows_and_lines(server, hf_tokenizer, preprocess, corpus_bytes, capsys) -> None:
    """Rows 0 to 4,999 have scores from 1.0 down to 0.5, so all row groups but the first are passed over."""
    found = []
    for number, uri in enumerate((server.uri("hf", FOLDER), str(server.folder / "jsonl"))):
        words = ("--input", uri, *KEYS, "--filter", "language_score > 0.9 and minhash_cluster_size in [1, 2]")
        out = preprocess(hf_tokenizer, *words, out=f"out/{number}")
        assert "--filter dropped 4,778 of 5,000 documents" in capsys.readouterr().out
        manifest = Manifest.read(f"{out}_text_document")
        assert manifest is not None and (manifest.documents, manifest.filtered_documents) == (222, 4778)
        found.append(corpus_bytes(f"{out}_text_document"))
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"--filter drops all 5,000 documents"):
        preprocess(hf_tokenizer, "--input", server.folder / "jsonl", *KEYS, "--filter", "langauge_score > 0.9")
    with pytest.raises(UserError, match="000.*no column langauge_score; its columns are text, id"):
        preprocess(hf_tokenizer, "--input", server.uri("s3", FOLDER), *KEYS, "--filter", "langauge_score > 0.9")


def test_a_project_knows_remote_files_by_their_content_not_by_a_commit(server, monkeypatch) -> None:
    path = f"{FOLDER}/train/000_00000.parquet"
    before = versions(server.uri("hf", path))
    assert before.keys() == {server.uri("hf", path)}
    (server.folder / ".commit").write_text("f" * 40)
    prepare_to_fork()
    found_text.cache_clear()
    assert versions(server.uri("hf", path)) == before
    (server.folder / ".commit").unlink()
    (file := server.folder / "versioned.jsonl").write_text("{}")
    first = versions(server.uri("s3", "versioned.jsonl"))
    file.write_text("[]")
    prepare_to_fork()
    monkeypatch.setattr("moelpr.project.file._identity", remote.identify)  # as another process would see it
    assert versions(server.uri("s3", "versioned.jsonl")) != first


def test_evaluation_and_estimates_read_uris(server, hf_tokenizer, folder) -> None:
    uri = server.uri("hf", FOLDER)
    assert read_documents(uri, max_documents=50) == read_documents(folder / FOLDER, max_documents=50)
    assert estimate([uri], "text", hf_tokenizer) == estimate([folder / FOLDER], "text", hf_tokenizer)


@pytest.mark.parametrize(
    ("last", "flags", "message"),
    [
        (pyarrow.table({"body": ["b"]}), (), "b.parquet has no column text; its columns are body"),
        (pyarrow.table({"text": [1]}), (), "b.parquet has a column text of the type int64, not of text"),
        (pyarrow.table({"text": [["b"]]}), (), r"b.parquet has a column text of the type list<element: string>"),
        (
            pyarrow.table({"text": ["b"], "score": ["high"]}),
            ("--filter", "score > 0.5"),
            'b.parquet, row 1: the key "score" contains a string, which the filter compares with 0.5',
        ),
        (b'{"body": "b"}\n', (), 'b.jsonl:1: the key "text" is missing'),
        (gzip.compress(b'\n{"text": 5}\n', mtime=0), (), 'b.jsonl.gz:2: the key "text" contains a number'),
    ],
)
def test_a_file_unlike_the_others_is_found_before_the_work_starts(
    last, flags, message, hf_tokenizer, preprocess, tmp_path, monkeypatch
) -> None:
    first = pyarrow.table({"text": ["a"] * 9, "score": [1.0] * 9})
    parquet.write_table(first, tmp_path / "a.parquet")
    if isinstance(last, bytes):
        path = tmp_path / ("b.jsonl.gz" if last.startswith(b"\x1f") else "b.jsonl")
        path.write_bytes(last)
    else:
        path = tmp_path / "b.parquet"
        parquet.write_table(last, path)
    monkeypatch.setattr(job.Job, "write", lambda *_: pytest.fail("the work has started"))
    words = ("--input", tmp_path / "a.parquet", path, "--language", "expanded", *flags)
    with pytest.raises(UserError, match=message):
        preprocess(hf_tokenizer, *words)
