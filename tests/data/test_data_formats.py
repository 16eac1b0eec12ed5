"""Text as people have it: packed, encoded, in rows, with links; each file exactly once, or refused in one sentence."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pytest

from hybridnas.data import DataConfig, open_source
from hybridnas.data.files import FileCorpus
from hybridnas.data.opening import CorpusFile, NotTextError, open_bytes
from hybridnas.data.rows import BadRowError
from hybridnas.data.text import text_files
from hybridnas.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

TEXT = "erste Zeile, größer\nsecond line €\n"


@pytest.fixture
def documents_of(tmp_path):
    """Return a function that reads a path as documents, under config fields."""

    def read(path, **fields):
        fields.setdefault("split_files", "never")
        config = DataConfig(kind="text", path=str(path), cache_dir=str(tmp_path / "cache"), **fields)
        return [one.decode() for one in FileCorpus(text_files(config.path), config, name=str(path)).documents()]

    return read


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(files):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return target.getvalue()


def tarred(mode, files):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return target.getvalue()


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_compressed_file_is_the_plain_one_in_all_its_members(tmp_path, documents_of, suffix, pack):
    halves = TEXT.encode()[:20], TEXT.encode()[20:]
    write(tmp_path / f"a.txt{suffix}", b"".join(pack(half) for half in halves))
    assert documents_of(tmp_path / f"a.txt{suffix}") == [TEXT]
    write(tmp_path / f"r.jsonl{suffix}", pack(json.dumps({"text": TEXT}).encode()))
    assert documents_of(tmp_path / f"r.jsonl{suffix}") == [TEXT]


def test_zstandard_is_read(tmp_path, documents_of):
    with pa.OSFile(str(tmp_path / "a.txt.zst"), "wb") as sink, pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(TEXT.encode() * 1000)
    assert documents_of(tmp_path / "a.txt.zst") == [TEXT * 1000]


def zstandard(raw):
    return pa.Codec("zstd").compress(raw, asbytes=True)


def test_zstandard_is_read_within_an_archive(tmp_path, documents_of):
    files = {"a.txt.zst": zstandard(TEXT.encode() * 1000)}
    write(tmp_path / "set.zip", zipped(files))
    write(tmp_path / "set.tar", tarred("w:", files))
    assert documents_of(tmp_path / "set.zip") == documents_of(tmp_path / "set.tar") == [TEXT * 1000]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["cut.zst", "trail.zst", "cut.bz2", "false.bz2"])
def test_a_damaged_zst_or_bz2_is_named(tmp_path, documents_of, name, rows):
    raw = (json.dumps({"text": TEXT}) + "\n").encode() * 100 + os.urandom(3000).hex().encode()
    packed = {
        "cut.zst": zstandard(raw)[:-9],
        "trail.zst": zstandard(raw) + b"garbage",
        "cut.bz2": bz2.compress(raw)[:-9],
        "false.bz2": b"BZh9" + b"x" * 500,
    }[name]
    file = write(tmp_path / name.replace(".", ".jsonl." if rows else ".txt."), packed)
    with pytest.raises(DataError, match="not soundly packed") as caught:
        documents_of(file, skip_bad_rows=True)
    assert str(file) in str(caught.value)


FILES = {
    "b.txt": b"zwei\n",
    "a/c.md": b"eins\n",
    "rows.jsonl": b'{"text": "drei"}\n',
    "pic.png": b"\0",
    ".git/x.txt": b"x",
}


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tar.gz", "set.tgz", "set.tar.bz2", "set.tar.xz"])
def test_an_archive_is_the_folder_that_was_packed(tmp_path, documents_of, name):
    for key, raw in FILES.items():
        write(tmp_path / "folder" / key, raw)
    if name == "set.zip":
        packed = zipped(FILES)
    else:
        packed = tarred("w:" + {"set.tar": "", "set.tgz": "gz"}.get(name, name.rpartition(".")[2]), FILES)
    write(tmp_path / name, packed)
    assert documents_of(tmp_path / name) == documents_of(tmp_path / "folder") == ["eins\n", "zwei\n", "drei"]


def test_a_zip_bomb_is_refused_before_it_fills_memory(tmp_path, documents_of):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.txt", "w") as member:
        for _ in range(300):
            member.write(b"a" * (1 << 20))
    write(tmp_path / "bomb.zip", target.getvalue())
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / "bomb.zip")
    assert (caught.value.field, caught.value.got) == ("data.path", 300 << 20)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, documents_of, encoding, suffix):
    body = {"txt": TEXT, "csv": f'text\n"{TEXT}"\n', "jsonl": json.dumps({"text": TEXT}, ensure_ascii=False)}[suffix]
    write(tmp_path / f"a.{suffix}", body.encode(encoding))
    assert documents_of(tmp_path / f"a.{suffix}") == [TEXT]


def test_an_encoding_that_is_named_is_that_of_every_file(tmp_path, documents_of):
    text = "schön, größer\n" * 10_000
    write(tmp_path / "a.txt", text.encode("latin-1"))
    assert documents_of(tmp_path / "a.txt", encoding="latin-1") == [text]
    assert "".join(documents_of(tmp_path / "a.txt", encoding="latin-1", split_files="always")) == text
    with pytest.raises(NotTextError) as caught:
        documents_of(tmp_path / "a.txt", encoding="ascii")
    assert (caught.value.field, caught.value.got) == ("data.encoding", "ascii")
    for wrong in ("latin-11", "base64"):
        with pytest.raises(ConfigError) as refused:
            DataConfig(kind="text", path="x", encoding=wrong)
        assert refused.value.field == "data.encoding"


def test_equal_text_has_an_equal_fingerprint_in_every_encoding(tmp_path):
    prints = set()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for name in "abc":
            text = "".join(f"text {name} {n}\n" for n in range(300))
            write(tmp_path / encoding / f"{name}.txt", text.encode(encoding))
        config = DataConfig(kind="text", path=str(tmp_path / encoding), cache_dir=str(tmp_path / "cache"))
        prints.add(open_source(config).fingerprint)
    assert len(prints) == 1


def test_a_cell_is_the_text_that_stands_there(tmp_path, documents_of):
    words = ["yes", "NA", "null", "None", "n/a", "007", "1.50", "", "12"]
    write(tmp_path / "a.csv", "text\n" + "".join(f'"{word}"\n' for word in words))
    assert documents_of(tmp_path / "a.csv") == [word for word in words if word]
    write(tmp_path / "n.csv", "text\n" + "\n".join([*map(str, range(12000)), *["word"] * 9000]) + "\n")
    assert len(documents_of(tmp_path / "n.csv")) == 21_000
    write(tmp_path / "s.csv", 'id;text\r\n1;"eins, zwei\nzweite ""Zeile"""\r\n2;drei\r\n')
    assert documents_of(tmp_path / "s.csv") == ['eins, zwei\nzweite "Zeile"', "drei"]
    write(tmp_path / "t.tsv", 'id\ttext\n1\teins\n2\t"zwei\tdrei"\n')
    assert documents_of(tmp_path / "t.tsv") == ["eins", "zwei\tdrei"]


@pytest.mark.parametrize(
    "names", [["part[0].parquet"], ["a*b.parquet"], ["shard?.parquet", "shard7.parquet"], ["a::b.csv"]]
)
def test_a_name_is_no_pattern_once_the_file_was_found(tmp_path, documents_of, names):
    for name in names:
        rows = [f"{name} {n}" for n in range(100)]
        if name.endswith("csv"):
            write(tmp_path / "run[1]" / name, "text\n" + "\n".join(rows))
        else:
            (tmp_path / "run[1]").mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": rows}), tmp_path / "run[1]" / name)
    found = documents_of(tmp_path / "run[1]")
    assert sorted(found) == sorted(f"{name} {n}" for name in names for n in range(100))


def test_parquet_and_arrow_hold_texts_lists_and_messages(tmp_path, documents_of):
    table = pa.table(
        {
            "n": [1, 2],
            "text": pa.array(["eins", None], pa.large_string()),
            "list": [["a", "b"], []],
            "meta": [{"body": "x"}, {"body": "y"}],
            "kind": pa.array(["one", "two"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    for name in ("t.parquet", "file.arrow", "stream.arrow"):
        assert documents_of(tmp_path / name) == ["eins"]
        assert documents_of(tmp_path / name, text_field="list") == ["a\nb"]
        assert documents_of(tmp_path / name, text_field="meta.body") == ["x", "y"]
        assert documents_of(tmp_path / name, text_field="kind") == ["one", "two"]
        with pytest.raises(DataError) as caught:
            documents_of(tmp_path / name, text_field="txt")
        assert (caught.value.field, caught.value.got) == ("data.text_field", "txt")
        assert set(caught.value.allowed) == set(table.column_names)
        with pytest.raises(DataError) as caught:
            documents_of(tmp_path / name, text_field="n")
        assert (caught.value.field, caught.value.got) == ("data.text_field", "int")


CHAT = [
    {"role": "user", "content": "Hallo"},
    {"role": "assistant", "content": [{"type": "text", "text": "Guten "}, {"text": "Tag"}]},
]


def test_nested_fields_and_chats_are_text(tmp_path, documents_of):
    write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT, "doc": {"body": {"raw": "tief"}}, "x.y": "flach"}) + "\n")
    assert documents_of(tmp_path / "a.jsonl", text_field="doc.body.raw") == ["tief"]
    assert documents_of(tmp_path / "a.jsonl", text_field="x.y") == ["flach"]
    assert documents_of(tmp_path / "a.jsonl", text_field="messages") == ["user: Hallo\nassistant: Guten Tag\n"]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    told = documents_of(tmp_path / "a.jsonl", text_field="messages", chat_template=template)
    assert told == ["<user>Hallo<assistant>Guten Tag"]
    for broken in ("{% for", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(DataError) as caught:
            documents_of(tmp_path / "a.jsonl", text_field="messages", chat_template=broken)
        assert caught.value.field == "data.chat_template"
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / "a.jsonl", text_field="doc.boddy.raw")
    assert (caught.value.got, caught.value.allowed) == ("doc.boddy.raw", ("body",))


BAD_ROWS = {
    "a.jsonl": '{"text": "eins"}\n{broken\n[1]\n{"body": "x"}\n{"text": 3}\n{"text": "zwei"}\n',
    "a.json": json.dumps([{"text": "eins"}, {"body": "x"}, {"text": 3}, 4, {"text": ["a", 1]}, {"text": "zwei"}]),
    "a.csv": "n,text\n1,eins\n2\n3\n4\n5\n6,zwei\n",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, documents_of, name):
    path = write(tmp_path / name, BAD_ROWS[name])
    with pytest.raises(BadRowError):
        documents_of(path)
    assert documents_of(path, skip_bad_rows=True) == ["eins", "zwei"]
    config = DataConfig(kind="text", path=str(path), cache_dir=str(tmp_path / "cache"), test_fraction=0)
    with pytest.raises(BadRowError):
        open_source(config)
    for _ in range(2):  # built, and read again from the cache
        assert "(without 4 rows that could not be read)" in open_source(config.replace(skip_bad_rows=True)).describe()


def test_a_corpus_of_bad_rows_says_what_was_wrong_with_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "x"}\n' * 3)
    config = DataConfig(kind="text", path=str(path), cache_dir=str(tmp_path / "cache"), skip_bad_rows=True)
    with pytest.raises(DataError, match=r"of 3 rows left out the first: .*has no field 'text'") as caught:
        open_source(config)
    assert caught.value.got == 3


def test_a_number_too_long_for_python_in_another_field_disturbs_nothing(tmp_path, documents_of):
    write(tmp_path / "a.jsonl", f'{{"text": "eins", "id": {"9" * 5000}}}\n')
    assert documents_of(tmp_path / "a.jsonl") == ["eins"]


def test_notebooks_pages_and_lists_of_objects_are_their_texts(tmp_path, documents_of):
    cells = [
        {"cell_type": "markdown", "source": ["# Titel\n", "Text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"data": {"image/png": "AAAA"}}]},
    ]
    write(tmp_path / "a.ipynb", json.dumps({"nbformat": 4, "cells": cells}))
    assert documents_of(tmp_path / "a.ipynb") == ["# Titel\nText\n\nx = 1\n"]
    head = "<html><head><title>Über</title><style>p {}</style></head>"
    page = f"{head}<body><p>Ein <b>Wort</b>\n mehr &amp; mehr</p><script>x()</script><pre>a\n  b</pre></body></html>"
    write(tmp_path / "a.html", page)
    assert documents_of(tmp_path / "a.html") == ["Über\nEin Wort mehr & mehr\na\n  b\n"]
    write(tmp_path / "a.json", json.dumps([{"text": "eins"}, {"text": "zwei"}]))
    assert documents_of(tmp_path / "a.json") == ["eins", "zwei"]
    write(tmp_path / "b.json", '{"text": "eins"}')
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / "b.json")
    assert (caught.value.field, caught.value.got) == ("data.path", "dict")
    write(tmp_path / "b.ipynb", '{"worksheets": []}')
    with pytest.raises(DataError, match="notebook"):
        documents_of(tmp_path / "b.ipynb")


def test_links_are_followed_once_and_circles_end(tmp_path, documents_of):
    write(tmp_path / "elsewhere/plain.txt", "dort\n")
    write(tmp_path / "set/own.txt", "hier\n")
    (tmp_path / "set/linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere/up").symlink_to("..")
    (tmp_path / "elsewhere/back").symlink_to("../set")
    assert sorted(documents_of(tmp_path / "set")) == ["dort\n", "hier\n"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(tmp_path, documents_of):
    path = write(tmp_path / "set/a.txt", "x")
    path.chmod(0)
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / "set")
    assert caught.value.got == str(path)


def test_one_long_line_is_cut_near_the_size_of_a_document(tmp_path):
    import random

    write(tmp_path / "dna.txt", "".join(random.Random(0).choices("ACGT", k=1_500_000)))
    source = open_source(DataConfig(kind="text", path=str(tmp_path / "dna.txt"), cache_dir=str(tmp_path / "cache")))
    total = source.train_tokens + source.valid_tokens + source.test_tokens
    assert 0.02 < source.valid_tokens / total < 0.1


def test_a_member_is_opened_as_its_bytes(tmp_path):
    path = write(tmp_path / "a.zip", zipped({"x.txt": b"abc"}))
    with open_bytes(CorpusFile(path, "a.zip/x.txt", "x.txt")) as handle:
        assert handle.read() == b"abc"
    write(tmp_path / "b.zip", b"no zip")
    with pytest.raises(DataError, match="not a sound archive"):
        text_files(str(tmp_path / "b.zip"))


def unreadable_tables():
    far = pa.array([10**15] * 2, pa.timestamp("s"))
    offsets = pa.py_buffer(b"".join(place.to_bytes(4, "little") for place in (0, 2, 4)))
    latin = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xffbc"))
    return {"text": pa.table({"text": latin}), "when": pa.table({"text": ["a", "b"], "when": far})}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_is_read_by_the_columns_that_are_needed(documents_of, tmp_path, suffix):
    tables = unreadable_tables()
    for name, table in tables.items():
        if suffix == ".parquet":
            pq.write_table(table, tmp_path / f"{name}{suffix}")
        else:
            with pa.ipc.new_file(str(tmp_path / f"{name}{suffix}"), table.schema) as target:
                target.write_table(table)
    assert documents_of(tmp_path / f"when{suffix}") == ["a", "b"]
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / f"text{suffix}")
    assert caught.value.field == "data.path"
    assert "rows 1 to 2" in str(caught.value)
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / f"when{suffix}", text_field="when")
    assert caught.value.field == "data.path"
    with pytest.raises(BadRowError) as caught:
        documents_of(tmp_path / f"when{suffix}", text_field="nope")
    assert (caught.value.field, caught.value.allowed) == ("data.text_field", ("text", "when"))


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ '%d' % 'a' }}", "{{ 9.0 ** 999 }}", "{{ [].index(1) }}"])
def test_whatever_a_chat_template_raises_is_said(documents_of, tmp_path, template):
    write(tmp_path / "a.jsonl", json.dumps({"text": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(DataError) as caught:
        documents_of(tmp_path / "a.jsonl", chat_template=template)
    assert caught.value.field == "data.chat_template"
