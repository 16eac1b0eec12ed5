"""Tokenised once, split by document, shared by processes, built again when damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest

from hybridnas.data import DataConfig, open_source, shards
from hybridnas.data.copies import CopyFinder
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
    test = documents_of(found.test.tokens, found.tokenizer)
    assert sorted(train + valid + test) == sorted(originals)
    assert not set(train) & set(valid) | set(train) & set(test) | set(valid) & set(test)
    assert [text for text in originals if text in set(train)] == train  # in the order of the corpus
    counted = (found.train.documents, found.valid.documents, found.test.documents)
    assert counted == (len(train), len(valid), len(test))
    assert 0.1 < len(valid) / 200 < 0.3
    assert 0 < len(test) / 200 < 0.15


def test_a_document_keeps_its_side_when_others_join(config, tmp_path):
    held_out, _ = split_by_document(corpus(config), config)
    before = {text: int(out) for text, out in zip(corpus(config).documents(), held_out, strict=True)}
    for n in range(50):
        (tmp_path / "corpus" / f"{n:03d}-more.txt").write_text(f"another {n}")
    held_out, _ = split_by_document(corpus(config), config)
    after = {text: int(out) for text, out in zip(corpus(config).documents(), held_out, strict=True)}
    assert len(after) == 150
    assert {text: after[text] for text in before} == before


def test_another_split_seed_holds_out_other_documents(config):
    sides = [split_by_document(corpus(config), config.replace(split_seed=seed))[0] for seed in (0, 0, 1)]
    assert (sides[0] == sides[1]).all()
    assert (sides[0] != sides[2]).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_few_documents_still_give_every_part(config, tmp_path, fraction):
    for n in range(1, 40):
        folder = tmp_path / f"few{n}"
        folder.mkdir()
        for side in ("a", "b", "c"):
            (folder / f"{side}.txt").write_text(f"{side}{n}")
        few = config.replace(path=str(folder), valid_fraction=fraction, test_fraction=0.4, split_files="never")
        assert sorted(split_by_document(corpus(few), few)[0]) == [0, 1, 2]
        (folder / "c.txt").unlink()
        two = few.replace(test_fraction=0.0)
        assert sorted(split_by_document(corpus(two), two)[0]) == [0, 1]
        with pytest.raises(DataError) as found:
            split_by_document(corpus(few), few)
        assert (found.value.got, found.value.allowed) == (2, ">= 3")


def test_near_copies_lie_in_one_part(config, tmp_path):
    draw = np.random.default_rng(0)
    folder = tmp_path / "near"
    folder.mkdir()
    for n in range(60):
        words = draw.integers(0, 10_000, 400)
        (folder / f"{n:02d}a.txt").write_text(" ".join(map(str, words)))
        words[draw.integers(0, 400, 8)] += 1  # a word in fifty is another one
        (folder / f"{n:02d}b.txt").write_text(" ".join(map(str, words)))
    near = config.replace(path=str(folder), test_fraction=0.2)
    parts, _ = split_by_document(corpus(near), near)
    assert (parts[::2] == parts[1::2]).all()
    assert all((parts == part).sum() >= 2 for part in range(3))


def test_of_much_held_out_text_long_copies_are_found_by_a_part_of_its_windows():
    draw = np.random.default_rng(2)
    texts = [draw.integers(0, 256, 20_000, dtype=np.uint8) for _ in range(4)]
    training = draw.integers(0, 256, 100_000, dtype=np.uint8)
    expected = 0
    for number, length in enumerate((300, 1000, 4000)):
        texts[number][5000 : 5000 + length] = training[7000 : 7000 + length]
        expected += length
    documents = [text.tobytes() for text in texts]
    for most in (1 << 23, 5000):
        finder = CopyFinder(documents, most=most)
        assert len(finder._hashes) <= most
        finder.read(training.tobytes())
        masks = [finder.copied(document) for document in documents]
        assert sum(int(mask.sum()) for mask in masks) == pytest.approx(expected, rel=0 if most > 5000 else 0.06)
        assert not masks[3].any() and not masks[2][:5000].any() and not masks[2][9000:].any()
        assert all(mask[5000:5300].any() for mask in masks[:3])


def test_copied_runs_are_not_measured(config, tmp_path):
    draw = np.random.default_rng(1)
    folder = tmp_path / "licence"
    folder.mkdir()
    licence = "This text stands at the head of every file, and nobody should be praised for remembering it by heart.\n"
    for n in range(80):
        (folder / f"{n}.txt").write_text(licence + " ".join(map(str, draw.integers(0, 10**6, 150))))
    for tokenizer in ("bytes", "bpe:300"):
        licensed = config.replace(path=str(folder), tokenizer=tokenizer)
        found = open_shards(corpus(licensed), licensed)
        share = len(licence) * found.valid.documents / found.valid.bytes
        assert found.valid.copied[0] == pytest.approx(share, rel=0.02)
        assert found.valid.copied[1] == 0  # no run of 256 bytes
        end = found.tokenizer.separator
        left = [
            found.tokenizer.decode(ids[(ids != end) & kept].tolist())
            for ids, kept in zip(
                np.split(found.valid.tokens, np.flatnonzero(found.valid.tokens == end) + 1)[:-1],
                np.split(found.valid.counted, np.flatnonzero(found.valid.tokens == end) + 1)[:-1],
                strict=True,
            )
        ]
        assert all(len(text) > 400 and "remembering" not in text and text[0].isdigit() for text in left)
        windows = open_source(licensed).valid_batches(10_000, 4, 32)
        assert 0.7 < np.mean([batch.mask_BL.double().mean() for batch in windows]) < 0.95


def test_text_that_mostly_repeats_itself_is_measured_whole(config):
    found = open_shards(corpus(config), config.replace(path=config.path))
    assert found.valid.copied[0] == 0  # each document's text is its own
    folder = config.cache.parent / "log"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text("a machine that reports its state, again and again, " * 40 + str(n))
    log = config.replace(path=str(folder))
    repeated = open_shards(corpus(log), log)
    assert repeated.valid.copied[0] > 0.9
    assert repeated.valid.counted is None


def test_one_document_cannot_be_split(config, tmp_path):
    for name in ("one", "copy"):
        (tmp_path / "corpus" / f"{name}.md").write_text("the only text\n" * 3)
    only = config.replace(path=str(tmp_path / "corpus" / "*.md"), split_files="never")
    with pytest.raises(DataError, match=r"set data.split_files=always") as found:
        open_source(only)
    assert (found.value.got, found.value.allowed) == (1, ">= 3")


def test_bytes_are_those_of_the_text_without_separators(config):
    found = open_shards(corpus(config), config)
    assert found.valid.bytes == len(found.valid.tokens) - found.valid.documents
    bpe = open_shards(corpus(config), config.replace(tokenizer="bpe:300"))
    assert bpe.valid.bytes == found.valid.bytes
    lengths = open_source(config.replace(tokenizer="bpe:300")).token_lengths
    assert lengths[bpe.valid.tokens].sum() == bpe.valid.bytes


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


@pytest.mark.slow
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


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("batches_done", [0, 3])
def test_a_build_that_was_stopped_goes_on_where_it_was(config, monkeypatch, tokenizer, batches_done):
    config = config.replace(tokenizer=tokenizer)
    whole = open_shards(corpus(config), config.replace(cache_dir=f"{config.cache}-whole"))
    monkeypatch.setattr(shards, "_BATCH_DOCUMENTS", 40)
    monkeypatch.setattr(shards, "SAVE_SECONDS", 0.0)
    batches = shards._batches

    def stopping(documents):
        for number, batch in enumerate(batches(documents)):
            if number == batches_done:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as interrupted:
        interrupted.setattr(shards, "_batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            open_shards(corpus(config), config)
    (folder,) = built(config)
    assert folder.suffix == ".unfinished"
    with (folder / "train.bin").open("ab") as file:
        file.write(b"half written")
    encoded, encode = [], type(whole.tokenizer).encode_batch
    monkeypatch.setattr(
        type(whole.tokenizer), "encode_batch", lambda own, texts: encoded.extend(texts) or encode(own, texts)
    )
    monkeypatch.setattr(shards, "split_by_document", None)  # found before the interruption, as the tokenizer was
    monkeypatch.setattr(shards, "train_bpe", None)
    found = open_shards(corpus(config), config)
    assert found.fingerprint == whole.fingerprint
    for mine, other in zip((found.train, found.valid, found.test), (whole.train, whole.valid, whole.test), strict=True):
        assert (mine.tokens == other.tokens).all()
        assert (mine.bytes, mine.documents, mine.copied) == (other.bytes, other.documents, other.copied)
    assert len(encoded) <= 200 - 40 * batches_done + whole.valid.documents + whole.test.documents
    (folder,) = built(config)
    assert {file.name for file in folder.iterdir()} == {
        *("train.bin", "valid.bin", "test.bin", "tokenizer.json", "tokenizer_config.json", "meta.json"),
        *(file.name for file in folder.glob("*.counted.bin")),
    }


def test_faulty_data_leaves_nothing_unfinished(config, tmp_path):
    (tmp_path / "corpus" / "bad.jsonl").write_text("{")
    with pytest.raises(DataError):
        open_shards(corpus(config), config)
    assert not built(config)
