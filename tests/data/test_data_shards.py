"""Tokenised once, split by document, shared by processes, built again when damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest

from hybridnas.data import DataConfig, open_source, shards
from hybridnas.data.files import FileCorpus
from hybridnas.data.shards import load_shards, open_shards, split_by_document
from hybridnas.data.text import text_files
from hybridnas.data.tokenizers import load_tokenizer
from hybridnas.errors import DataError


@pytest.fixture
def config(tmp_path):
    """200 documents of different length, two of each text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(200):
        (folder / f"{n:03d}.txt").write_text(f"document {n % 100}\n" * (1 + n % 100))
    return DataConfig(kind="text", path=str(folder), valid_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def corpus(config):
    return FileCorpus(text_files(config.path), config, name="corpus")


def built(config):
    return [path for path in (config.cache / "shards").iterdir() if path.is_dir()]


def documents_of(tokens, tokenizer):
    """Cut ids at the separators and decode each document."""
    ends = np.flatnonzero(tokens == tokenizer.separator)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[part != tokenizer.separator].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_is_on_one_side_whole_and_copies_are_together(config, tokenizer):
    found = open_shards(corpus(config), config.replace(tokenizer=tokenizer))
    train = documents_of(found.train.tokens, found.tokenizer)
    valid = documents_of(found.valid.tokens, found.tokenizer)
    originals = [file.path.read_text() for file in corpus(config).files]
    assert sorted(train + valid) == sorted(originals)
    assert not set(train) & set(valid)
    assert [text for text in originals if text in set(train)] == train  # in the order of the corpus
    assert (found.train.documents, found.valid.documents) == (len(train), len(valid))
    assert 0.1 < len(valid) / 200 < 0.3


def test_a_document_keeps_its_side_when_others_join(config, tmp_path):
    held_out, _ = split_by_document(corpus(config), config)
    before = {text: bool(out) for text, out in zip(corpus(config).documents(), held_out, strict=True)}
    for n in range(50):
        (tmp_path / "corpus" / f"{n:03d}-more.txt").write_text(f"another {n}")
    held_out, _ = split_by_document(corpus(config), config)
    after = {text: bool(out) for text, out in zip(corpus(config).documents(), held_out, strict=True)}
    assert len(after) == 150
    assert {text: after[text] for text in before} == before


def test_another_split_seed_holds_out_other_documents(config):
    sides = [split_by_document(corpus(config), config.replace(split_seed=seed))[0] for seed in (0, 0, 1)]
    assert (sides[0] == sides[1]).all()
    assert (sides[0] != sides[2]).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_few_documents_still_give_both_sides(config, tmp_path, fraction):
    for n in range(1, 40):
        folder = tmp_path / f"few{n}"
        folder.mkdir()
        for side in ("a", "b"):
            (folder / f"{side}.txt").write_text(f"{side}{n}")
        few = config.replace(path=str(folder), valid_fraction=fraction, split_files="never")
        held_out, _ = split_by_document(corpus(few), few)
        assert held_out.sum() == 1


def test_one_document_cannot_be_split(config, tmp_path):
    for name in ("one", "copy"):
        (tmp_path / "corpus" / f"{name}.md").write_text("the only text\n" * 3)
    only = config.replace(path=str(tmp_path / "corpus" / "*.md"), split_files="never")
    with pytest.raises(DataError, match=r"only one document \(or copies of it\).*set data.split_files=always"):
        open_source(only)


def test_bytes_are_counted_with_one_for_each_separator(config):
    found = open_shards(corpus(config), config)
    assert found.valid.bytes == len(found.valid.tokens)
    assert open_source(config).bytes_per_token == 1.0
    bpe = open_shards(corpus(config), config.replace(tokenizer="bpe:300"))
    assert bpe.valid.bytes == found.valid.bytes
    assert open_source(config.replace(tokenizer="bpe:300")).bytes_per_token == bpe.valid.bytes / len(bpe.valid.tokens)


def test_ids_take_the_smallest_unsigned_type(config):
    assert open_shards(corpus(config), config).train.tokens.dtype == np.uint8
    assert open_shards(corpus(config), config.replace(tokenizer="bpe:300")).train.tokens.dtype == np.uint16


def test_a_second_opening_tokenises_nothing(config, monkeypatch):
    first = open_source(config)
    monkeypatch.setattr(shards, "_build", lambda *_: pytest.fail("built again"))
    assert open_source(config).fingerprint == first.fingerprint
    assert len(built(config)) == 1


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": "bpe:300"}, {"valid_fraction": 0.3}, {"split_seed": 1}, {"max_bytes": 30_000}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_other_shards(config, change):
    first, other = open_source(config), open_source(config.replace(**change))
    assert len(built(config)) == 2
    assert first.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_changed_text_is_noticed(config, tmp_path):
    first = open_source(config)
    (tmp_path / "corpus" / "000.txt").write_text("rewritten")
    assert open_source(config).fingerprint != first.fingerprint


def flip_a_byte(folder):
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "train.bin").write_bytes(raw)


DAMAGE = {
    "shortened": lambda folder: (folder / "valid.bin").write_bytes(b"abc"),
    "one byte": flip_a_byte,
    "gone": lambda folder: (folder / "train.bin").unlink(),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "meta": lambda folder: (folder / "meta.json").write_text('{"format": 1, "files"'),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "other format": lambda folder: (folder / "meta.json").write_text(json.dumps({"format": 0})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_built_again_and_it_is_said(config, caplog, damage):
    first = open_source(config)
    sound = first.train_batch(3, 4, 16, 0).inputs_BL
    (folder,) = built(config)
    DAMAGE[damage](folder)
    assert load_shards(folder) is None
    again = open_source(config)
    assert again.fingerprint == first.fingerprint
    assert again.train_batch(3, 4, 16, 0).inputs_BL.equal(sound)
    assert "is damaged and is built again" in caplog.text


def test_what_a_killed_builder_left_is_cleared_away(config):
    first = open_source(config)
    (folder,) = built(config)
    leftover = folder.parent / f"{folder.name}.tmp-1-dead"
    folder.rename(leftover)
    assert open_source(config).fingerprint == first.fingerprint
    assert built(config) == [folder]


def test_a_build_that_fails_leaves_nothing(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_ids", full)
    with pytest.raises(DataError, match=r"no space left for tokenised data in .*; free some, or set data.cache_dir"):
        open_source(config)
    assert built(config) == []


def test_a_cache_that_cannot_be_written_names_the_setting(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write tokenised data to .*; set data.cache_dir or .*HYBRIDNAS_CACHE"):
        open_source(config.replace(cache_dir=str(tmp_path / "file")))


def test_the_cache_is_where_the_environment_says(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "elsewhere"))
    assert config.replace(cache_dir=None).cache == tmp_path / "elsewhere"
    monkeypatch.delenv("HYBRIDNAS_CACHE")
    assert config.replace(cache_dir=None).cache.parts[-2:] == (".cache", "hybridnas")


PROCESS = """
import sys, json
from hybridnas.data import open_source, source_config
source = open_source(source_config(json.loads(sys.argv[1])))
print(source.fingerprint, source.train_tokens)
"""


@pytest.mark.parametrize("locks", [True, False], ids=["locked", "no-locks"])
def test_processes_that_build_at_once_agree_and_leave_one_sound_folder(config, locks):
    blind = "" if locks else "import sys; sys.modules['fcntl'] = None\n"
    command = [sys.executable, "-c", blind + PROCESS, json.dumps(config.replace(tokenizer="bpe:400").to_dict())]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (folder,) = built(config)
    found = load_shards(folder)
    assert said == {f"{found.fingerprint} {len(found.train.tokens)}\n"}


def test_the_sources_tokenizer_is_saved_whole(config, tmp_path):
    source = open_source(config.replace(tokenizer="bpe:300"))
    source.save_tokenizer(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded.fingerprint == source.tokenizer.fingerprint
    batch = source.train_batch(0, 1, 32, 0)
    assert "document" in loaded.decode(batch.inputs_BL[0].tolist())
