"""Data behind URLs: what a URL names, copies that are fetched once, and what cannot be read."""

import functools
import gzip
import http.server
import io
import os
import socket
import threading
import zipfile

import fsspec
import pytest

from hybridnas.data import open_source, source_config
from hybridnas.data.text import text_files
from hybridnas.errors import ConfigError, DataError

LINES = [f"line {number} of a file that is read from afar, with words enough\n" for number in range(400)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a function that writes name -> bytes into fsspec's memory, which is empty before and after."""
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()

    def write(**files):
        for name, content in files.items():
            memory.pipe_file(f"/set/{name.replace('__', '/').replace('_', '.')}", content)

    yield write
    memory.store.clear()


def names(path, suffixes=(".txt", ".jsonl")):
    return [(file.key, file.place, file.path.read_bytes()) for file in text_files(path, suffixes)]


def test_a_url_names_a_file_a_folder_or_a_glob(store):
    packed = gzip.compress(b"packed")
    store(a_txt=b"first", b__c_txt=b"second", b__d_txt_gz=packed, e_png=b"no", _hidden_txt=b"hidden")
    assert names("memory://set/a.txt") == [("/set/a.txt", "memory:///set/a.txt", b"first")]
    assert names("memory://set") == [
        ("a.txt", "memory:///set/a.txt", b"first"),
        ("b/c.txt", "memory:///set/b/c.txt", b"second"),
        ("b/d.txt.gz", "memory:///set/b/d.txt.gz", packed),
    ]
    assert [key for key, *_ in names("memory://set/**/*.txt")] == ["/set/.hidden.txt", "/set/a.txt", "/set/b/c.txt"]
    assert [content for *_, content in names("memory://set/a.txt,memory://set/b/c.txt")] == [b"first", b"second"]


def test_data_behind_a_url_is_the_same_as_on_disk(store, tmp_path):
    text = "".join(LINES).encode()
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("inner.txt", text)
    store(a_txt=text, z_zip=whole.getvalue(), g_fa=b">one\n" + b"ACGT" * 2000 + b"\n")
    (tmp_path / "a.txt").write_bytes(text)
    local = open_source(source_config({"kind": "text", "path": str(tmp_path / "a.txt")}))
    for url in ("memory://set/a.txt", "memory://set/z.zip"):
        remote = open_source(source_config({"kind": "text", "path": url}))
        assert remote.fingerprint == local.fingerprint
        assert url in remote.describe()
    dna = open_source(source_config({"kind": "dna", "path": "memory://set/g.fa", "split_by": "segment"}))
    assert "bases to train on" in dna.describe()


def test_a_file_is_fetched_once_and_again_when_it_has_changed(store, monkeypatch):
    from hybridnas.data import remote

    asked, stream = [], remote._stream
    monkeypatch.setattr(remote, "_stream", lambda *given: asked.append(given[1]) or stream(*given))
    store(a_txt=b"first", b_txt=b"second")
    assert [content for *_, content in names("memory://set")] == [b"first", b"second"]
    assert names("memory://set") and asked == ["/set/a.txt", "/set/b.txt"]
    store(a_txt=b"other")
    assert [content for *_, content in names("memory://set")] == [b"other", b"second"]
    assert asked == ["/set/a.txt", "/set/b.txt", "/set/a.txt"]


def test_what_was_cut_off_is_not_used_and_the_same_call_goes_on(store, tmp_path, monkeypatch):
    from hybridnas.data import remote

    store(a_txt=b"first", b_txt=b"second" * 100)
    monkeypatch.setattr(remote, "_BLOCK", 100)
    real = fsspec.filesystem("memory").open

    class Cut(io.BytesIO):
        def read(self, count=-1):
            if self.tell() >= 200:
                raise ConnectionResetError("connection lost")
            return super().read(count)

    monkeypatch.setattr(fsspec.filesystem("memory"), "open",
                        lambda name, mode: Cut(real(name, mode).read()) if "b.txt" in name else real(name, mode),
                        raising=False)  # fmt: skip
    with pytest.raises(DataError) as caught:
        names("memory://set")
    assert caught.value.got == "/set/b.txt" and "connection lost" in str(caught.value)
    assert not list((tmp_path / "cache" / "remote").glob("*/b.txt"))
    monkeypatch.undo()
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    assert [content for *_, content in names("memory://set")] == [b"first", b"second" * 100]
    assert not list((tmp_path / "cache" / "remote").glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("url", "error", "got"),
    [
        ("memory://set/absent", DataError, "memory://set/absent"),
        ("memory://set/*.txt", DataError, "memory://set/*.txt"),
        ("nosuch://set/a.txt", ConfigError, "nosuch"),
    ],
)
def test_what_is_not_there_is_said_by_its_url(store, url, error, got):
    with pytest.raises(error) as caught:
        text_files(url)
    assert (caught.value.field, caught.value.got) == ("data.path", got)
    assert url in str(caught.value)


def test_an_error_in_a_file_names_its_url(store):
    store(rows_jsonl=b'{"text": "good"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"memory:///set/rows\.jsonl line 2"):
        open_source(source_config({"kind": "text", "path": "memory://set/rows.jsonl"}))


@pytest.mark.slow
def test_a_file_of_a_web_server_is_named_by_the_url_that_was_given(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.txt").write_bytes(b"first")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.txt"
        assert [(place, content) for _, place, content in names(url)] == [(url, b"first")]
        server.shutdown()


def test_s3_is_read_from_a_server(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="needs the extra: pip install 'hybridnas[s3]'")
    server = pytest.importorskip("moto.server", reason="needs moto[server], a stand-in for S3")
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    moto.start()
    try:
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
        client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="texts")
        client.put_object(Bucket="texts", Key="set/a.txt", Body="".join(LINES).encode())
        source = open_source(source_config({"kind": "text", "path": "s3://texts/set"}))
        (tmp_path / "a.txt").write_text("".join(LINES))
        local = open_source(source_config({"kind": "text", "path": str(tmp_path / "a.txt")}))
        assert source.fingerprint == local.fingerprint
        with pytest.raises(DataError) as caught:
            text_files("s3://absent/set")
        assert caught.value.got == "s3://absent/set"
    finally:
        moto.stop()
