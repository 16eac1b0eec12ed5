"""Malformed files of people, from the command line: one sentence that names the file and the place, and exit code 2."""

import json
import zipfile

import numpy as np
import pytest

from hybridnas.cli import run

TRAIN = ["train", "pattern=M", "arch.d_model=8", "train.tokens=10000", "train.seq_len=256", "device=cpu", "out=run"]


def six_channels(soundfile):
    soundfile.write("six.wav", np.zeros((8000, 6)), 16_000)


def protein(_):
    with open("p.fa", "w") as handle:  # noqa: PTH123
        handle.write(">one\nACGT\n>two\nMKVLLE\n")


def bomb(_):
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.txt", bytes(1 << 29))


def write(name, text):
    def make(_):
        with open(name, "w") as handle:  # noqa: PTH123
            handle.write(text)

    return make


def other_column(_):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"other": ["a", "b"]}), "m.parquet")


def copies(_):
    import os

    os.mkdir("copies")  # noqa: PTH102
    for number in range(20):
        write(f"copies/{number}.txt", "the same text in every file\n" * 3)(None)


DESCRIBE = ["data", "describe"]
FORTY = "".join(json.dumps({"text": str(number)}) + "\n" for number in range(40))
CASES = {
    "a recording of six channels": (
        six_channels, [*DESCRIBE, "data=audio", "data.path=six.wav"], ("six.wav", "6 channels", "data.channel")),
    "a FASTA file of proteins": (
        protein, [*DESCRIBE, "data=dna", "data.path=p.fa"], ("p.fa line 4", "'L' at character 4", "A C G T")),
    "a zip bomb": (bomb, [*DESCRIBE, "data.path=bomb.zip"], ("bomb.zip (inner.txt)", "536,870,912 bytes")),
    "lines that are lists": (
        write("l.jsonl", '[1, 2]\n["a"]\n'), [*DESCRIBE, "data.path=l.jsonl"], ("l.jsonl line 1", "list")),
    "a table without the column": (
        other_column, [*DESCRIBE, "data.path=m.parquet"], ("m.parquet row 1", "'text'", "it has: other")),
    "a corpus shorter than one window": (
        write("s.jsonl", FORTY), [*TRAIN, "data=text", "data.path=s.jsonl"], ("s.jsonl", "256")),
    "a corpus that is one text in twenty copies": (
        copies, [*TRAIN, "data=text", "data.path=copies"], ("copies", "copies")),
    "a number that is a word": (
        write("n.csv", "text,label\n" + "a,much\n" * 9),
        [*DESCRIBE, "data=labels", "data.path=n.csv", "data.target=number"], ("n.csv", "'much'", "data.label_field")),
    "a quote that is not closed": (
        write("q.csv", 'text,n\n"a\nb",1\nc,2\n"d,3\ne,4\n'), [*DESCRIBE, "data.path=q.csv"], ("q.csv", "line 5")),
    "a place that no protocol reads": (
        lambda _: None, [*DESCRIBE, "data.path=nosuch://bucket/file"], ("nosuch://bucket/file", "fsspec")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_sentence_that_says_where(name, tmp_path, monkeypatch, capsys):
    make, arguments, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    make(pytest.importorskip("soundfile") if "recording" in name else None)
    assert run(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def test_24_bits_are_no_bad_input(tmp_path, monkeypatch, capsys):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for number in range(4):
        soundfile.write(f"set/{number}.wav", 0.1 * np.sin(np.arange(900)), 16_000, subtype="PCM_24")
    assert run([*DESCRIBE, "data=audio", "data.path=set", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["recordings"] == 4
