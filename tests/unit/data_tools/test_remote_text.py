"""Text at URIs: a data set in FineWeb-2's layout gives the same corpus from every place, whatever the network does."""

import gzip
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError  # type: ignore[import-untyped]
from huggingface_hub import constants
from pyarrow import parquet

from data_tools import merge_data, preprocess_data
from moelpr.base.errors import MachineError, UserError
from moelpr.base.settings import call
from moelpr.data.text import remote
from moelpr.data.text.estimate import estimate
from moelpr.data.text.reading import read_documents
from moelpr.data.text.sources import find_files
from moelpr.project.file import found_text, versions
from tests.support.text_server import COMMIT, TextServer, text_server
from tests.unit.data_tools.conftest import SENTENCES, corpus_bytes

WAYS = ("http", "s3", "hf")
FOLDER = "data/ell_Grek"
KEYS = ("--language-key", "language", "--original-languages", "en", "--expanded-languages", "el", "--append-eod")
ROWS, ROWS_IN_GROUP = 500, 200


def fineweb_2(first: int, count: int, text: str) -> pyarrow.Table:
    """Rows with some of FineWeb-2's columns."""
    names = ["text", "id", "language", "language_score", "minhash_cluster_size"]
    numbers = range(first, first + count)
    rows = ((f"{text} {n}. " * (1 + n % 7), f"<{n:08x}>", "ell", 1 - n / 2000, n % 9) for n in numbers)
    return pyarrow.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is served: the data set, and its training text as JSON lines, plain and packed."""
    top = tmp_path_factory.mktemp("served")

    def write(path: str, table: pyarrow.Table) -> None:
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, top / path, row_group_size=ROWS_IN_GROUP)

    train = [fineweb_2(number * ROWS, ROWS, SENTENCES["el"]) for number in range(2)]
    for number, table in enumerate(train):
        write(f"{FOLDER}/train/{number:03}_00000.parquet", table)
    write(f"{FOLDER}/test/000_00000.parquet", fineweb_2(0, 9, "held out"))
    write(f"{FOLDER}_removed/train/000_00000.parquet", fineweb_2(0, 9, "removed"))
    rows = [row for table in train for row in table.to_pylist()]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    for suffix, content in {"jsonl": lines, "jsonl.gz": gzip.compress(lines)}.items():
        (top / suffix).mkdir()
        (top / suffix / f"el.{suffix}").write_bytes(content)
    return top


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[TextServer]:
    with text_server(folder) as server:
        yield server


@pytest.fixture
def server(running: TextServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextServer:
    """The server as the libraries find it, and an empty cache."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": running.address, "HF_HUB_OFFLINE": False, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, setting in {**settings, "HF_HOME": tmp_path / "cache"}.items():
        monkeypatch.setattr(constants, name, setting)
    monkeypatch.setattr(remote, "_WAITS_S", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr("moelpr.data.text.estimate._LONGEST_S", 99)  # the machine may be busy
    running.fail("", 0)
    running.requests()
    return running


@pytest.fixture(scope="module")
def expected(folder, hf_tokenizer, tmp_path_factory) -> list[bytes]:
    """The corpus of the local folder."""
    out = tmp_path_factory.mktemp("local") / "a"
    call(preprocess_data.main, [*map(str, ("--input", folder / FOLDER, *flags(hf_tokenizer), "--output-prefix", out))])
    return corpus_bytes(f"{out}_text_document")


def flags(tokenizer: Path) -> list[str]:
    return [*KEYS, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--workers", "1"]


@pytest.mark.parametrize(("way", "shards"), [("http", 1), ("s3", 1), ("hf", 1), ("http", 3)])
def test_every_way_gives_the_corpus_of_the_local_folder(way, shards, server, expected, preprocess) -> None:
    words = ["--input", server.uri(way, FOLDER + "/" * (way == "http")), *KEYS]
    for shard in range(shards):
        more = ["--num-shards", shards, "--shard", shard] if shards > 1 else []
        made = preprocess(*words, *more, workers=2)
    if shards > 1:
        call(merge_data.main, ["--output-prefix", made.path(), "--num-shards", str(shards)])
    assert made.content() == expected
    manifest = made.manifest()
    assert manifest.languages.keys() == {"el"}  # the documents' own column, by its code
    assert [source.documents for source in manifest.sources] == [ROWS, ROWS]
    assert all(source.bytes and source.version and "/train/" in source.path for source in manifest.sources)
    assert (COMMIT in manifest.sources[0].path) == (way == "hf")
    assert "hidden" not in Path(f"{made.path()}.manifest.json").read_text("utf-8")


@pytest.mark.parametrize("way", WAYS)
def test_files_are_found_by_pattern(way, server) -> None:
    folder = remote.pinned(server.uri(way, "data"))

    def found(pattern: str) -> str:
        names = remote.matches(f"{folder}/{pattern}")
        return " ".join(name.removeprefix(f"{folder}/ell_Grek").removesuffix("_00000.parquet") for name in names)

    assert found("ell_*/t[er]*/*.parquet") == "/test/000 /train/000 /train/001 _removed/train/000"
    assert found("ell_*/*.parquet") == "" and found("ell_Grek/train/*1_*") == "/train/001"
    assert found("**/000*.parquet") == "/test/000 /train/000 _removed/train/000"


@pytest.mark.parametrize("uri", ["s3://bucket/", "s3://bucket/*/*/*.jsonl", "http://localhost/**/*.jsonl"])
@pytest.mark.parametrize(("folder", "message"), [("forbidden", "Access Denied"), ("again", "2 folders")])
def test_a_folder_below_that_fails_or_lists_itself_is_an_error(folder, message, uri, monkeypatch) -> None:
    """fsspec's own walk leaves out what fails below the first folder."""

    def ls(path: str, **_: Any) -> list[dict[str, str]]:
        if path.endswith("forbidden"):
            raise PermissionError("Access Denied")
        return [{"name": f"{path.rstrip('/')}/{folder}", "type": "directory"}]

    system = SimpleNamespace(ls=ls, async_impl=True, unstrip_protocol=str, info=lambda *_, **__: {"type": "directory"})
    monkeypatch.setattr(remote, "_file_system", lambda _: system)
    monkeypatch.setattr(remote, "_MOST_FOLDERS", 2)
    with pytest.raises(UserError, match=message):
        find_files([uri])


@pytest.mark.parametrize("pattern", ["*.jsonl", "**"])
def test_pages_of_a_bucket_without_end_are_an_error(pattern, server, monkeypatch) -> None:
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
    page = f"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount>{more}</ListBucketResult>"

    def find(address: str) -> None:
        remote.close_connections()
        monkeypatch.setenv("AWS_ENDPOINT_URL", address.rpartition("/")[0])
        find_files([f"s3://bucket/folder/{pattern}"])

    monkeypatch.setattr(remote, "_LISTING_S", 1.0)
    with pytest.raises(UserError, match="no end"):
        ask(find, 200, page.encode(), Content_Type="application/xml")
    remote.close_connections()


@pytest.mark.parametrize("kind", ["cut", "503", "500"])
@pytest.mark.parametrize("way", WAYS)
def test_what_may_pass_is_tried_again(way, kind, server) -> None:
    """Connections that end in the midst of a file, throttling and failing servers."""
    uri = remote.pinned(server.uri(way, "jsonl/el.jsonl"))
    identity = remote.identify(uri)
    server.fail(kind, times=2)
    assert Path(remote.download({uri: identity})[uri]).read_bytes() == (server.folder / "jsonl/el.jsonl").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_downloaded_is_not_downloaded_again(way, server) -> None:
    """Not by the next command, nor under another commit, nor after a failure; shards need only their own files."""
    [first, second] = find_files([server.uri(way, FOLDER + "/" * (way == "http"))])
    second += "?signature=hidden" * (way == "http")
    identities = {uri: remote.identify(uri) for uri in (first, second)}
    before = remote.download({first: identities[first]})
    for status in ("403", "500"):
        server.fail(status, times=99)
        with pytest.raises(MachineError, match="can't be read") as error:
            remote.download(identities)
        assert "hidden" not in str(error.value)
    server.fail("", 0)
    server.requests()
    copies = remote.download(identities)
    assert copies[first] == before[first] and Path(copies[second]).stat().st_size == identities[second].bytes
    assert not [line for line in server.requests() if line.startswith("GET") and first.rpartition("/")[2] in line]
    assert remote.download({first.replace(COMMIT, "f" * 40): identities[first]}).popitem()[1] == before[first]


def test_a_server_that_sends_files_only_whole(server, expected, hf_tokenizer, preprocess) -> None:
    server.fail("whole", times=1 << 30)
    uri = server.uri("http", "jsonl/el.jsonl")
    tokens = estimate([uri], "text", hf_tokenizer).tokens
    assert tokens == estimate([server.folder / "jsonl/el.jsonl"], "text", hf_tokenizer).tokens
    assert preprocess("--input", uri, *KEYS).content() == expected


@pytest.mark.parametrize(("way", "version"), [("http", '"other"'), ("hf", "0" * 64)])
def test_a_file_that_changes_is_noticed(way, version, server, tmp_path) -> None:
    uri = remote.pinned(server.uri(way, "jsonl/el.jsonl"))
    identity = remote.identify(uri)._replace(version=version)
    with pytest.raises(UserError, match="el.jsonl has changed"):
        remote.download({uri: identity})
    assert not [*(tmp_path / "cache/moelpr").iterdir()]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://datasets/owner/gated/x.parquet", "gated.*hf auth login"),
        ("hf://datasets/owner/absent/x.parquet", "hf://datasets/owner/absent/x.parquet"),
        ("hf://datasets/owner/name@gone/x.parquet", "(?i)name@gone.*not found"),
        ("hf://datasets/owner/name/none.parquet", "(?i)none.parquet.*not found"),
        ("s3://bucket/none.parquet", "(?i)s3://bucket/none.parquet.*not found"),
        ("{http}/none.parquet?signature=hidden", "(?i)http.*/none.parquet .*not found"),
        ("http://user:hidden@localhost/a.jsonl", "contains a login.*netrc"),
        ("{http}/jsonl/*.none", "no file matches"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(uri, message, server, preprocess) -> None:
    with pytest.raises(UserError, match=message) as error:
        preprocess("--input", uri.format(http=f"{server.address}/files"), *KEYS)
    assert "hidden" not in str(error.value)


class Answer(OSError):
    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize(
    "error, kind",
    [
        *((Answer(status), MachineError) for status in (429, 500, 503)),
        *((Answer(status), UserError) for status in (400, 403, 404)),
        (ConnectionRefusedError(), MachineError),
        (EndpointConnectionError(endpoint_url="https://s3.example.org"), MachineError),
        (FileNotFoundError(), UserError),
    ],
)
def test_a_server_that_is_down_is_no_wrong_input(error: Exception, kind: type[Exception]) -> None:
    """Kubernetes starts a job again that ends with 1, and ends a set of jobs of which one ends with 2."""
    with pytest.raises(kind, match="s3://bucket/a can't be read"), remote.explained("s3://bucket/a"):
        try:
            raise error
        except Exception as inner:
            raise OSError("a library's") from inner


def test_an_address_without_a_server_is_said_with_what_to_check() -> None:
    assert remote._is_final(NoCredentialsError())
    with pytest.raises(MachineError, match="can't be read .*check the network"):
        remote.identify("http://127.0.0.1:9/a.jsonl")


def test_a_filter_keeps_the_same_rows_and_lines(server, preprocess, capsys) -> None:
    actual = []
    for number, uri in enumerate((server.uri("hf", FOLDER), server.folder / "jsonl")):
        words = ("--input", uri, *KEYS, "--filter", "language_score > 0.9 and minhash_cluster_size in [1, 2]")
        made = preprocess(*words, out=f"out/{number}")
        assert "--filter dropped 955 of 1,000 documents" in capsys.readouterr().out
        assert (made.manifest().documents, made.manifest().filtered_documents) == (45, 955)
        actual.append(made.content())
    assert actual[0] == actual[1]
    with pytest.raises(UserError, match=r"--filter drops all 1,000 documents"):
        preprocess("--input", server.folder / "jsonl", *KEYS, "--filter", "langauge_score > 0.9")
    with pytest.raises(UserError, match="000.*no column langauge_score; its columns are text, id"):
        preprocess("--input", server.uri("s3", FOLDER), *KEYS, "--filter", "langauge_score > 0.9")


def test_a_project_knows_remote_files_by_their_content_not_by_a_commit(server, monkeypatch) -> None:
    path = f"{FOLDER}/train/000_00000.parquet"
    before = versions(server.uri("hf", path))
    assert before.keys() == {server.uri("hf", path)}
    (server.folder / ".commit").write_text("f" * 40)
    remote._file_system("hf://").invalidate_cache()
    found_text.cache_clear()
    assert versions(server.uri("hf", path)) == before
    (server.folder / ".commit").unlink()
    (file := server.folder / "versioned.jsonl").write_text("{}")
    first = versions(server.uri("s3", "versioned.jsonl"))
    file.write_text("[]")
    monkeypatch.setattr("moelpr.project.file._identity", lambda uri: remote.identify(uri, refresh=True))
    assert versions(server.uri("s3", "versioned.jsonl")) != first


def test_evaluation_and_estimates_read_uris(server, hf_tokenizer, folder) -> None:
    uri = server.uri("hf", FOLDER)
    assert read_documents(uri, max_documents=50) == read_documents(folder / FOLDER, max_documents=50)
    assert estimate([uri], "text", hf_tokenizer) == estimate([folder / FOLDER], "text", hf_tokenizer)


def ask(call: Callable[[str], Any], status: int, body: bytes = b"", **headers: str) -> None:
    """Call a function with the address of a server that gives one answer to everything; _ in a header's name is -."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if status == 206 and "Range" not in self.headers else status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            call(f"http://127.0.0.1:{server.server_port}/text.jsonl")
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        *(
            (f"http://{host}", "leads to .* no public address; pass another$")
            for host in ("127.0.0.2:1/x", "0/", "[::1]/")
        ),
        ("http://169.254.169.254/latest", "^http://127.0.0.1:[0-9]+/text.jsonl leads to 169.254.169.254, which is no"),
        ("/text.jsonl", r"\(too many redirects\)"),
    ],
)
def test_a_redirect_into_this_machine_or_network_or_without_end_is_refused(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(remote.identify, 302, Location=target)


def test_a_part_that_was_not_asked_for_is_refused() -> None:
    part = {"Accept_Ranges": "bytes", "Content_Length": "4", "Content_Range": "bytes 1-4/9"}
    with pytest.raises(UserError, match="another part"):
        ask(lambda uri: remote.first_bytes(uri, 4), 206, b"text", **part)
