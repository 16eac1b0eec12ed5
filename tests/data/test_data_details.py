"""What ``data describe`` says of data: documents, scripts, copies and samples, and how a long reading is shown."""

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest

from hybridnas.cli import run
from hybridnas.data import SOURCES, DataConfig, open_source, progress, source_config
from hybridnas.data.details import scripts


def write(folder, texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def words(seed, count=200):
    return " ".join(map(str, np.random.default_rng(seed).integers(0, 10**6, count)))


@pytest.fixture
def source(tmp_path):
    """40 documents: 30 of their own, 6 equal to the first, 4 that nearly are the second."""
    texts = {f"{n:02d}.txt": words(n) for n in range(30)}
    texts |= {f"same{n}.txt": words(0) for n in range(6)}
    texts |= {f"near{n}.txt": words(1).replace(words(1).split()[5 + n], "x", 1) for n in range(4)}
    folder = write(tmp_path / "corpus", texts)
    config = DataConfig(
        kind="text", path=str(folder), cache_dir=str(tmp_path / "cache"), split_files="never", valid_fraction=0.2
    )
    return open_source(config)


def test_documents_bytes_tokens_and_duplicates_are_counted(source):
    details = source.details(10, 0)
    figures = details.figures
    assert (figures["documents"], figures["exact duplicates"], figures["near duplicates"]) == (40, 6, 4)
    assert figures["tokens"] == figures["bytes"] + 40
    for name in ("documents", "bytes", "tokens"):
        assert sum(part[name] for part in details.parts.values()) == figures[name]
    assert set(details.parts) == {"train", "valid", "test"}


def test_samples_are_documents_and_the_same_at_every_call(source):
    samples = source.details(10, 0).samples
    assert samples == source.details(10, 0).samples
    assert samples != source.details(10, 1).samples
    assert len({sample.where for sample in samples}) == 10
    documents = [document.decode() for document in source._corpus.documents()]
    assert all(any(document.startswith(sample.text) for document in documents) for sample in samples)
    assert len(source.details(1000, 0).samples) == 40
    assert source.details(0, 0).samples == []


def test_scripts_are_those_of_the_characters_names():
    folded = "\uff11\uff12 \uff41 \U0001d431 \u00aa \u00b5"  # wide digits and a, bold x, ordinal a, micro
    text = f"abc ABC é {folded}, жук 漢字 かな 가 αβ 123 !?"
    letters, shares = scripts(Counter(text))
    assert letters == sum(unicodedata.category(one).startswith("L") for one in text)
    counts = {name: round(share * letters) for name, share in shares.items()}
    assert counts == {"Latin": 10, "Cyrillic": 3, "Greek": 3, "CJK": 2, "Hiragana": 2, "Hangul": 1}
    assert scripts({}) == (0, {})


@pytest.mark.parametrize("kind", ["mqar", "parity", "induction_heads"])
def test_a_task_shows_examples(kind):
    assert kind in SOURCES
    details = open_source(source_config({"kind": kind})).details(3, 0)
    assert [len(sample.text.split("->")) for sample in details.samples] == [2, 2, 2]
    shares = list(details.shares.values())
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)


def test_the_command_prints_tables_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "corpus", {f"{n}.txt": words(n) + " größer\x1b[2J\n" for n in range(20)})
    settings = ["describe", "data.path=corpus", f"data.cache_dir={tmp_path}/cache", "samples=2"]
    assert run(["data", *settings]) == 0
    printed = capsys.readouterr().out
    assert "documents\t20" in printed and "Latin\t100.0 %" in printed
    assert "\x1b" not in printed
    assert run(["data", *settings, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["figures"]["documents"] == 20 and len(found["samples"]) == 2
    assert run(["data", "delete", "data.path=corpus"]) == 2


class Shown:
    def __init__(self, stage, total):
        self.stage, self.total, self.moves, self.closed = stage, total, [], False

    def move(self, done):
        self.moves.append(done)

    def close(self):
        self.closed = True


def test_a_long_reading_is_shown_and_a_short_one_is_not(monkeypatch):
    clock = iter(np.arange(0, 100, 0.5).tolist())
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    made = []

    def read(stage, steps):
        with progress.reporting(stage, 100) as report:
            for done in range(1, steps + 1):
                report(done)
            raise KeyError

    def show(stage, total):
        made.append(Shown(stage, total))
        return made[-1]

    with progress.shown_by(show):
        for stage, steps in (("short", 1), ("long", 5)):
            with pytest.raises(KeyError):
                read(stage, steps)
    with pytest.raises(KeyError):
        read("unseen", 5)
    (shown,) = made
    assert (shown.stage, shown.total, shown.moves, shown.closed) == ("long", 100, [2, 3, 4, 5], True)
