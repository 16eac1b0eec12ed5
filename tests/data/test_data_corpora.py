"""What is read: the standard library, the user's files, rows of datasets, and what is refused."""

import gzip
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from hybridnas.config import FrozenConfig
from hybridnas.data import SOURCES, DataConfig, Source, check_vocab, open_source, register_source, source_config
from hybridnas.data.files import FileCorpus
from hybridnas.data.source import SourceConfig
from hybridnas.data.stdlib import stdlib_files
from hybridnas.data.text import text_files
from hybridnas.errors import ConfigError, DataError


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def corpus_of(tmp_path, cache):
    """Return a function that reads paths as documents, under config fields."""

    def read(path, **fields):
        config = DataConfig(kind="text", path=str(path), cache_dir=cache, **fields)
        return list(FileCorpus(text_files(config.path), config, name=str(path)).documents())

    return read


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_importing_the_package_loads_no_heavy_library():
    heavy = {"torch", "datasets", "tokenizers", "rich", "numpy"}
    code = f"import sys, hybridnas.data; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_standard_library_is_over_five_megabytes_of_modules_without_tests():
    files = stdlib_files()
    keys = [file.key for file in files]
    assert keys == sorted(keys)
    assert {"argparse.py", "asyncio/base_events.py", "idlelib/editor.py"} <= set(keys)
    folders = {part for key in keys for part in key.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    assert sum(file.path.stat().st_size for file in files) > 5_000_000


def test_a_python_without_sources_names_the_other_way(tmp_path):
    with pytest.raises(DataError, match=r"source text is not at .*; use data=text data.path=FILES"):
        stdlib_files(tmp_path)


def test_a_folder_gives_its_text_files_and_leaves_out_hidden_and_other_ones(tmp_path):
    for name in ("b.txt", "a/x.md", "a/code.py", "pic.png", ".git/config.txt", "old.txt.gz", "rows.jsonl"):
        write(tmp_path / name, "x")
    assert [f.key for f in text_files(str(tmp_path))] == ["a/code.py", "a/x.md", "b.txt", "old.txt.gz", "rows.jsonl"]


def test_files_globs_and_lists_are_joined_without_repeats(tmp_path):
    for name in ("a.log", "b.log", "c,d.txt"):
        write(tmp_path / name, name)
    both = text_files(f"{tmp_path}/*.log, {tmp_path}/b.log")
    assert [f.path.name for f in both] == ["a.log", "b.log"]
    assert [f.path.name for f in text_files(f"{tmp_path}/c,d.txt")] == ["c,d.txt"]
    assert len(text_files((f"{tmp_path}/a.log", f"{tmp_path}/c,d.txt"))) == 2


def test_documents_are_whole_files_and_rows_and_the_gzipped_text_equals_the_plain(tmp_path, corpus_of):
    write(tmp_path / "p/a.txt", "erste Zeile\r\nzweite, größer\n")
    write(tmp_path / "p/b.jsonl", '{"text": "eins"}\n\n{"text": "zw\\u00f6lf\\n"}\n{"text": ""}\n{"text": null}\n')
    expected = ["erste Zeile\r\nzweite, größer\n".encode(), b"eins", "zwölf\n".encode()]
    assert corpus_of(tmp_path / "p", split_files="never") == expected
    for name in ("a.txt", "b.jsonl"):
        write(tmp_path / f"z/{name}.gz", gzip.compress((tmp_path / "p" / name).read_bytes()))
    assert corpus_of(tmp_path / "z", split_files="never") == expected


def test_equal_text_has_an_equal_fingerprint_wherever_it_lies(tmp_path, cache):
    prints = []
    for folder, zipped in (("one", False), ("two", True)):
        for name in ("a", "b"):
            text = f"text {name}\n".encode() * 300
            path = tmp_path / folder / f"{name}.txt"
            write(path.with_suffix(".txt.gz") if zipped else path, gzip.compress(text) if zipped else text)
        config = DataConfig(kind="text", path=str(tmp_path / folder), cache_dir=cache)
        prints.append(open_source(config).fingerprint)
    assert prints[0] == prints[1]


def test_a_single_long_file_is_cut_at_line_ends_into_documents_that_join_to_it(tmp_path, corpus_of):
    text = "".join(f"Zeile {n}: übergroß\n" for n in range(20_000))
    write(tmp_path / "book.txt", text)
    pieces = corpus_of(tmp_path / "book.txt")
    assert b"".join(pieces).decode() == text
    assert len(pieces) > 200
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert corpus_of(tmp_path / "book.txt", split_files="never") == [text.encode()]


def test_a_long_file_without_lines_is_never_cut_inside_a_character(tmp_path, corpus_of):
    write(tmp_path / "line.txt", "€" * 1_200_000)  # three bytes each, one line of 3.6 MB
    pieces = corpus_of(tmp_path / "line.txt")
    assert len(pieces) > 1
    assert "".join(piece.decode() for piece in pieces) == "€" * 1_200_000


@pytest.mark.parametrize("limit", [1, 5, 1000, 1503])
def test_max_bytes_takes_the_first_text_and_no_more(tmp_path, corpus_of, limit):
    for name in "abc":
        write(tmp_path / f"d/{name}.txt", f"{name}é" * 300)
    whole = b"".join(corpus_of(tmp_path / "d", split_files="never"))
    taken = b"".join(corpus_of(tmp_path / "d", split_files="never", max_bytes=limit))
    assert whole.startswith(taken)
    assert limit - 1 <= len(taken) <= limit
    taken.decode()


def test_parquet_jsonl_and_csv_of_the_same_rows_are_the_same_documents(tmp_path, corpus_of):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [f"document {n}, with a comma\nand ünïcode" for n in range(50)]
    pq.write_table(pa.table({"body": rows, "n": list(range(50))}), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", "".join(json.dumps({"body": row}) + "\n" for row in rows))
    write(tmp_path / "rows.csv", "n,body\n" + "".join(f'{n},"{row}"\n' for n, row in enumerate(rows)))
    for suffix in ("parquet", "jsonl", "csv"):
        assert corpus_of(tmp_path / f"rows.{suffix}", text_field="body") == [row.encode() for row in rows]


def test_a_hub_dataset_is_streamed_once_and_then_needs_its_source_no_more(tmp_path, cache):
    rows = [f"row number {n} of the dataset\n" for n in range(200)]
    data = write(tmp_path / "set/train.jsonl", "".join(json.dumps({"content": row}) + "\n" for row in rows))
    config = DataConfig(kind="hub", name=str(tmp_path / "set"), text_field="content", cache_dir=cache)
    first = open_source(config)
    data.unlink()
    again = open_source(config.replace(tokenizer="bpe:300"))
    text = "".join(rows)
    assert first.train_tokens + first.valid_tokens + first.test_tokens == len(text) + len(rows)
    assert again.vocab_size == 300


def test_a_hub_dataset_is_taken_up_to_max_bytes(tmp_path, cache):
    write(tmp_path / "set/train.jsonl", "".join(json.dumps({"text": f"{n:09d}\n"}) + "\n" for n in range(500)))
    config = DataConfig(kind="hub", name=str(tmp_path / "set"), max_bytes=1000, cache_dir=cache)
    source = open_source(config)
    assert (
        source.train_tokens + source.valid_tokens + source.test_tokens == 1000 + 100
    )  # a separator for each of the 100 rows


def test_the_hub_without_network_names_the_offline_ways(monkeypatch, cache):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"allenai/c4 cannot be fetched, because .* forbids the network; data=stdlib and data=text"
    ):
        open_source(DataConfig(kind="hub", name="allenai/c4", config="en", cache_dir=cache))


def test_a_missing_network_is_said_without_waiting(monkeypatch):
    import socket

    import huggingface_hub.constants

    from hybridnas.data.network import why_offline

    def refuse(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.delenv("ALL_PROXY", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "there is no network" in why_offline()


BAD_FILES = {
    "latin.txt": (
        "gut\nschön".encode("latin-1"),
        r"latin.txt is not UTF-8 text: byte 0xf6 at offset 7; set data.encoding",
    ),
    "cut.txt": ("schön".encode()[:4], r"cut.txt is not UTF-8 text: byte 0xc3 at offset 3"),
    "far.txt": (b"a" * 1_048_575 + "é".encode() + b"\xff", r"far.txt is not UTF-8 text: byte 0xff at offset 1048577"),
    "binary.txt": (b"text\x00text", r"binary.txt is not text: byte 0x00 at offset 4"),
    "broken.txt.gz": (gzip.compress(b"text" * 1000)[:-20], r"broken.txt.gz is not soundly packed"),
    "fake.txt.gz": (b"no gzip at all", r"fake.txt.gz is not soundly packed"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "b', r"half.jsonl line 2 is not JSON: Unterminated string"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', r"list.jsonl line 2 is not an object of named fields but list"),
    "field.jsonl": (b'{"body": "a"}\n', r"field.jsonl line 1 has no field 'text'; it has: body; set data.text_field"),
    "number.jsonl": (b'{"text": 3}\n', r"number.jsonl line 1 field 'text' is int, not text"),
    "pair.jsonl": (b'{"text": "\\ud800"}\n', r"pair.jsonl line 1 field 'text' holds half a surrogate pair"),
    "latin.jsonl": (b'{"text": "\xf6"}\n', r"latin.jsonl line 1 is not UTF-8 text"),
    "fake.parquet": (b"PAR1 not really", r"fake.parquet cannot be read as parquet: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_text_is_named_with_the_place(tmp_path, corpus_of, name):
    content, message = BAD_FILES[name]
    write(tmp_path / "d/good.txt", "good\n" * 100)
    write(tmp_path / "d" / name, content)
    with pytest.raises(DataError, match=message):
        corpus_of(tmp_path / "d")


def test_files_that_are_not_text_can_be_left_out_and_are_counted(tmp_path, cache):
    write(tmp_path / "d/good.txt", "".join(f"good line {n}\n" for n in range(1000)))
    write(tmp_path / "d/binary.txt", b"\x00\x01")
    source = open_source(DataConfig(kind="text", path=str(tmp_path / "d"), cache_dir=cache, skip_bad_files=True))
    assert "without 1 file not text" in source.describe()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"is a folder without text files \(.txt, .md, .*; name other files by a glob"),
        (["a.txt", "b.md"], r"holds no text: 2 files, all empty"),
        (["rows.jsonl"], r"holds no text: 1 files"),
    ],
)
def test_an_empty_corpus_says_so(tmp_path, cache, names, message):
    (tmp_path / "d").mkdir()
    for name in names:
        write(tmp_path / "d" / name, "\n" if name.endswith("jsonl") else "")
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(kind="text", path=str(tmp_path / "d"), cache_dir=cache))


def test_a_path_that_matches_nothing_says_what_may_be_given(tmp_path):
    with pytest.raises(DataError, match=r"data.path='.*nothing/\*' matches no file; give a file, a folder, or a glob"):
        text_files(f"{tmp_path}/nothing/*")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "txt"}, r"unknown data 'txt'; did you mean 'text'"),
        ({"kind": "text"}, r"data=text needs data.path="),
        ({"kind": "hub"}, r"data=hub needs data.name=DATASET"),
        ({"path": "x"}, r"path='x' goes with data=text, not with data=stdlib"),
        ({"tokenizer": "bpe:12"}, r"tokenizer='bpe:12' must be bpe:SIZE with a SIZE of at least 257"),
        ({"tokenizer": "bpe:300", "vocab_size": 400}, r"tokenizer='bpe:300' and vocab_size=400 disagree"),
        ({"vocab_size": 300}, r"vocab_size=300 goes with tokenizer=bpe; 'bytes' has a size of its own"),
        ({"separator": "</s>"}, r"separator='</s>': tokenizer='bytes' has one of its own"),
        ({"valid_fraction": 0.0}, r"valid_fraction=0.0 must be > 0"),
        ({"pth": "x"}, r"data has no field 'pth'; did you mean 'path'"),
        ({"kind": "text", "path": [1]}, r"must be text or a list of text"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        open_source(source_config(fields))


def test_a_config_survives_json_and_reads_shell_words():
    config = DataConfig(kind="text", path=("a", "b"), tokenizer="bpe", vocab_size=512)
    assert source_config(json.loads(json.dumps(config.to_dict()))) == config
    shell = source_config({"kind": "text", "path": "a,b", "tokenizer": "bpe", "vocab_size": "512"}, parse=True)
    assert (shell.vocab_size, shell.bpe_vocab) == (512, 512)


def test_every_field_of_every_kind_has_a_line_of_meaning():
    for kind in SOURCES:
        config = SOURCES.get(kind).config
        assert issubclass(config, FrozenConfig)
        assert all(field.metadata["doc"] for field in fields(config))


def test_a_new_kind_is_one_registration_with_a_config_of_its_own():
    from dataclasses import dataclass

    from hybridnas.config import option

    @dataclass(frozen=True, kw_only=True)
    class CountConfig(SourceConfig):
        kind: str = option("count", "kind of data")
        n: int = option(4, "symbols [count]", ge=1)

    @register_source("count", config=CountConfig)
    class Count(Source):
        def __init__(self, config):
            self.n = config.n

        vocab_size = property(lambda self: self.n)
        fingerprint = property(lambda self: "0" * 64)
        describe = train_batch = valid_batches = None

    try:
        source = open_source(source_config({"kind": "count", "n": "7"}, parse=True))
        assert source.vocab_size == 7
        with pytest.raises(DataError, match="Count has no tokenizer to save: its ids are not text"):
            source.save_tokenizer("nowhere")
        with pytest.raises(ConfigError, match="data kind='count' takes CountConfig, got SourceConfig"):
            open_source(SourceConfig(kind="count"))
    finally:
        SOURCES.remove("count")


def test_a_vocabulary_larger_than_the_models_is_refused():
    check_vocab(256, 256)
    with pytest.raises(DataError, match=r"the data has 4,096 different tokens but the model only vocab_size=256;"):
        check_vocab(4096, 256)
