"""Recordings: how samples become ids and sound again, resampling, windows within a recording, and what is refused."""

import gzip
import io
import json
import math
import os
import shutil
import subprocess
import sys
import wave
import zipfile

import numpy as np
import pytest

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.cli import run
from hybridnas.data import audio, open_source, source_config
from hybridnas.data.audio import resampled
from hybridnas.data.pieces import PieceError
from hybridnas.data.sound import ENCODINGS, Coding, wav_bytes
from hybridnas.data.tokenizers import load_tokenizer
from hybridnas.draw.spectrogram import spectrogram
from hybridnas.errors import ConfigError, DataError
from hybridnas.export.folder import export

soundfile = pytest.importorskip("soundfile", reason="needs the extra: pip install 'hybridnas[audio]'")

RATE = 16_000


def tone(hertz, seconds=0.25, rate=RATE, loud=0.5):
    return (loud * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def sound(tmp_path):
    """Return a function that writes recordings, name -> samples, and opens them as data."""

    def read(recordings=None, rate=RATE, subtype=None, **fields):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for name, samples in (recordings or {}).items():
            soundfile.write(folder / name, samples, rate, subtype=subtype)
        fields.setdefault("path", str(folder))
        fields.setdefault("cache_dir", str(tmp_path / "cache"))
        return open_source(source_config({"kind": "audio", **fields}))

    return read


def ids_of(source, name):
    number = source._store.names.index(name)
    return np.asarray(source._store.ids[source._store.bounds[number] : source._store.bounds[number + 1]])


FOUR = {f"{hertz}.wav": tone(hertz) for hertz in (200, 300, 400, 500)}


def test_mu_law_is_the_papers_equation():
    x = np.linspace(-1, 1, 4001)
    companded = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(1 + 255)  # WaveNet, section 2.2
    ids = Coding(RATE, "mulaw8").encode(x.astype(np.float32))
    assert np.abs(ids - (companded + 1) / 2 * 255).max() <= 0.5 + 1e-4
    assert (ids[0], ids[2000], ids[-1]) == (0, 128, 255)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ids_decode_to_what_encodes_to_them(encoding):
    coding = Coding(RATE, encoding)
    ids = np.arange(256) if coding.ids_per_sample == 1 else np.arange(512) * 2654435761 % 65536 % 256
    assert coding.encode(coding.decode(ids)).tolist() == ids.tolist()
    assert coding.decode([]).shape == (0,)
    assert coding.encode(np.array([2, -2], dtype=np.float32)).tolist() == coding.encode(np.array([1, -1.0])).tolist()


def test_sixteen_bits_lose_nothing(sound):
    levels = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    source = sound({f"{n}.wav": np.roll(levels, n) for n in range(4)}, encoding="linear16")
    pairs = ids_of(source, "1.wav").astype(np.int64).reshape(-1, 2)
    assert (pairs[:, 0] * 256 + pairs[:, 1] - 32768 == np.roll(levels, 1)).all()
    with wave.open(io.BytesIO(wav_bytes(Coding(RATE, "linear16").decode(ids_of(source, "1.wav")), RATE))) as written:
        assert np.array_equal(np.frombuffer(written.readframes(4000), "<i2"), np.roll(levels, 1))
        assert (written.getframerate(), written.getnchannels()) == (RATE, 1)


FORMATS = [("a.wav", "PCM_U8"), ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "PCM_32"), ("a.wav", "FLOAT"),
           ("a.wav", "DOUBLE"), ("a.flac", "PCM_16"), ("a.flac", "PCM_24"), ("a.aiff", "PCM_16")]  # fmt: skip


@pytest.mark.parametrize(("name", "subtype"), FORMATS)
def test_every_format_holds_the_same_sound(sound, name, subtype):
    source = sound({f"{n}{name}": tone(440) for n in range(3)}, subtype=subtype, encoding="linear8")
    expected = np.floor((tone(440).astype(np.float64) + 1) / 2 * 255 + 0.5)
    assert np.abs(ids_of(source, f"1{name}") - expected).max() <= 1  # eight bits hold it to one step


@pytest.mark.parametrize(("given", "wanted"), [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (16_000, 16_000)])
def test_resampling_by_blocks_is_that_of_the_whole(monkeypatch, given, wanted):
    from scipy.signal import resample_poly

    monkeypatch.setattr(audio, "_BLOCK", 1000)
    x = np.random.default_rng(0).normal(0, 0.1, 12_345).astype(np.float32)
    blocks = iter(np.split(x, [700, 1500, 6000, 6001]))
    found = np.concatenate(list(resampled(blocks, given, wanted)))
    shared = math.gcd(given, wanted)
    whole = resample_poly(x, wanted // shared, given // shared) if given != wanted else x
    assert found.shape == whole.shape
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_a_recording_is_brought_to_the_rate_and_keeps_its_pitch(sound):
    source = sound({f"{n}.wav": tone(440, rate=44_100) for n in range(3)}, rate=44_100)
    samples = source.coding.decode(ids_of(source, "1.wav"))
    assert len(samples) == pytest.approx(RATE / 4, abs=1)
    power, times, frequencies = spectrogram(samples, RATE)
    assert frequencies[power.sum(axis=1).argmax()] == pytest.approx(440, abs=RATE / 512)
    assert times[-1] < 0.25
    assert source.details(2, 0).shares == {"44,100 Hz": pytest.approx(1)}


def test_of_two_channels_the_mean_is_read_and_of_more_one_is_chosen(sound, tmp_path):
    stereo = np.stack((tone(300), -0.5 * tone(300)), axis=1)
    source = sound({f"{n}.wav": stereo for n in range(3)}, encoding="linear8")
    expected = np.floor((0.25 * tone(300).astype(np.float64) + 1) / 2 * 255 + 0.5)
    assert np.abs(ids_of(source, "0.wav") - expected).max() <= 1
    six = {f"{n}.wav": np.stack([tone(100 * k) for k in range(1, 7)], axis=1) for n in range(3)}
    with pytest.raises(PieceError) as caught:
        sound(six)
    assert (caught.value.field, caught.value.got) == ("data.channel", 6)
    third = sound(channel=3, encoding="linear8")
    assert np.abs(ids_of(third, "0.wav") - np.floor((tone(300).astype(np.float64) + 1) / 2 * 255 + 0.5)).max() <= 1
    with pytest.raises(PieceError) as caught:
        sound(channel=7)
    assert (caught.value.got, caught.value.allowed) == (7, "1 to 6")


def test_windows_lie_within_one_recording_and_parts_are_recordings(sound):
    source = sound(FOUR)
    names = [{source._store.names[number] for number in source._parts[part]} for part in ("train", "valid", "test")]
    assert sorted(len(own) for own in names) == [1, 1, 2] and set.union(*names) == set(FOUR)
    whole = [ids_of(source, name).tolist() for name in names[0]]
    batch = source.train_batch(0, 16, 200, 0)
    for row, target in zip(batch.inputs_BL.tolist(), batch.targets_BL[:, -1:].tolist(), strict=True):
        window = row + target
        assert any(window in [text[at : at + 201] for at in range(len(text) - 200)] for text in whole)
    assert source.valid_tokens == len(FOUR["200.wav"]) - 1
    assert source.vocab_size == 256 and source.unit == ("sample", 1)


def test_packed_recordings_are_the_plain_ones(sound, tmp_path):
    plain = sound(FOUR)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in FOUR:
            archive.write(tmp_path / "set" / name, name)
    assert sound(path=str(tmp_path / "set.zip"))._store.digest == plain._store.digest


def test_details_count_seconds_and_clipped_samples(sound):
    source = sound({f"{n}.wav": tone(200, loud=1.5) for n in range(4)}, subtype="FLOAT")
    details = source.details(10, 0)
    assert details.figures["recordings"] == 4 and details.figures["seconds"] == pytest.approx(1)
    assert details.figures["samples beyond full scale"] == 4 * int((np.abs(tone(200, loud=1.5)) > 1).sum())
    assert len(details.samples) == 4
    assert sum(part["seconds"] for part in details.parts.values()) == pytest.approx(1)


def bad_files(folder):
    folder.mkdir()
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "head.wav").write_bytes(wav_bytes(tone(200), RATE)[:20])
    soundfile.write(folder / "nan.wav", np.array([0, 0.5, np.nan], dtype=np.float32), RATE, subtype="FLOAT")
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["empty.wav", "head.wav", "nan.wav", "text.wav"])
def test_what_is_no_sound_is_named(sound, tmp_path, name):
    assert name in bad_files(tmp_path / "bad")
    with pytest.raises(PieceError, match=name) as caught:
        sound(path=str(tmp_path / "bad" / name))
    assert (caught.value.field, caught.value.got) == ("data.path", str(tmp_path / "bad" / name))


def test_recordings_without_samples_and_windows_longer_than_all_are_refused(sound, tmp_path):
    (tmp_path / "none.wav").write_bytes(wav_bytes(np.zeros(0, dtype=np.float32), RATE))
    with pytest.raises(PieceError) as caught:
        sound(path=str(tmp_path / "none.wav"))
    assert caught.value.field == "data.path"
    with pytest.raises(DataError) as caught:
        sound(FOUR).train_batch(0, 1, 10_000, 0)
    assert caught.value.got == 10_000
    with pytest.raises(ConfigError):
        sound(encoding="mp3")


def test_without_the_package_the_extra_is_named(sound, monkeypatch):
    sound(FOUR)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"hybridnas\[audio\]") as caught:
        sound(encoding="linear8")
    assert caught.value.got == "audio"


@pytest.mark.parametrize("encoding", ["mulaw8", "linear16"])
def test_a_model_of_sound_is_measured_per_sample_exported_and_heard(sound, tmp_path, monkeypatch, capsys, encoding):

    monkeypatch.chdir(tmp_path)
    source = sound(FOUR, encoding=encoding)
    export(HybridLM(Arch.from_pattern("F", d_model=8, vocab_size=256), seed=0), tmp_path / "model", source=source)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.kind, tokenizer.coding) == ("audio", source.coding)
    assert "out=sample.wav" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(DataError):
        tokenizer.encode("text")
    data = ["data=audio", "data.path=set", f"data.encoding={encoding}", f"data.cache_dir={tmp_path}/cache"]
    assert run(["evaluate", "model=model", *data, "seq_len=64", "valid_tokens=500", "device=cpu"]) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line)
    per = source.coding.ids_per_sample
    assert float(rows["bits per sample"]) == pytest.approx(
        per * float(rows["loss [nats per token]"]) / math.log(2), abs=3e-4
    )
    asked = ["generate", "model=model", "max_new_tokens=1200", "device=cpu"]
    assert run([*asked, "out=made/sample.wav", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    made, rate = soundfile.read("made/sample.wav")
    assert (len(made), rate) == (1200 // per, RATE) and found["tokens"] == 1200
    assert (tmp_path / "made" / "sample.png").read_bytes().startswith(b"\x89PNG")
    assert np.abs(made).max() > 0
    for wrong in ([], ["out=sample.mp3"], ["out=a.wav", "prompt=x"]):
        assert run([*asked, *wrong]) == 2


def test_the_report_of_a_search_on_recordings_shows_and_plays_them(sound, tmp_path):
    import base64

    from hybridnas.report.report import render_report
    from hybridnas.search.sound import SoundFiles
    from hybridnas.study.callbacks import StudyEnded, StudyStarted
    from hybridnas.study.records import StudyMeta

    loud = np.concatenate((tone(440, 0.5, loud=0.01), tone(880, 0.3), tone(440, 0.5, loud=0.01)))
    source = sound({f"{number}.wav": loud for number in range(4)})
    found = source.excerpt("valid", 4000)
    assert len(found) == 4000 and np.abs(found).mean() > 0.25  # out of the loud middle
    assert len(source.excerpt("valid", 10**6)) == len(loud)
    study = tmp_path / "study"
    export(HybridLM(Arch.from_pattern("F", d_model=8, vocab_size=256), seed=0), study / "best", source=source)
    meta = StudyMeta(name="sound", kind="audio", bits_per="sample")
    callback = SoundFiles()
    identity = {"data": source.config.to_dict()}
    callback.on_study_start(StudyStarted(folder=study, meta=meta, identity=identity, records=[], tracking=None))
    callback.on_study_end(StudyEnded(folder=study, meta=meta, records=[], ended="COMPLETED"))
    made, rate = soundfile.read(study / "sound" / "generated.wav")
    assert (len(made), rate) == (RATE, RATE)
    page = render_report(study, [], meta)
    for name in ("held_out", "generated"):
        for kind, suffix in (("image/png", ".png"), ("audio/wav", ".wav")):
            inside = base64.b64encode((study / "sound" / f"{name}{suffix}").read_bytes()).decode()
            assert f"data:{kind};base64,{inside}" in page
    other = tmp_path / "other"
    other.mkdir()
    callback.on_study_end(StudyEnded(folder=other, meta=meta, records=[], ended="COMPLETED"))
    assert not (other / "sound").exists()  # no winner was exported
    assert "<audio" not in render_report(other, [], meta)


WORDS = ("one two three", "the sea is calm", "where were you", "seven lamps", "a green bottle", "north and south")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng, which .ci/run installs")
def test_speech_is_predicted_better_than_by_how_common_its_samples_are(tmp_path):
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.loop import run as train

    folder = tmp_path / "speech"
    folder.mkdir()
    for number, words in enumerate(WORDS):
        subprocess.run(["espeak-ng", "-w", str(folder / f"{number}.wav"), words], check=True)
    data = {"kind": "audio", "path": str(folder), "rate": 8000, "cache_dir": str(tmp_path / "cache")}
    source = open_source(source_config(data))
    assert source.details(2, 0).shares == {"22,050 Hz": 1.0} and len(source._store.names) == len(WORDS)
    counts = np.bincount(np.concatenate([ids_of(source, f"{number}.wav") for number in range(len(WORDS))]))
    shares = counts[counts > 0] / counts.sum()
    config = TrainConfig(tokens=64 * 16 * 60, batch_size=16, seq_len=64, lr=2e-2, valid_tokens=8192)
    result = train(Arch.from_pattern("MF", d_model=16, vocab_size=256), source, config, device="cpu")
    assert result.valid_loss < -(shares * np.log(shares)).sum()


@pytest.mark.parametrize("name", ["cut.wav.gz", "damaged.zip"])
def test_damaged_packed_sound_is_refused(sound, tmp_path, name):
    raw = wav_bytes(tone(440), RATE)
    if name == "cut.wav.gz":
        packed = gzip.compress(raw)[:-20]
    else:
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("a.wav", raw)
        packed = target.getvalue().replace(raw[1000:1040], b"x" * 40)
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(PieceError, match="soundly packed") as caught:
        sound(path=str(tmp_path / name))
    assert (caught.value.field, caught.value.got) == ("data.path", str(tmp_path / name))


def test_a_recording_whose_name_is_not_utf_8_is_read(sound, tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(4):
        path = os.fsencode(tmp_path / "set") + b"/\xff%d.wav" % number
        try:
            with open(path, "wb") as target:  # noqa: PTH123
                target.write(wav_bytes(tone(440), RATE))
        except OSError:
            pytest.skip("this file system holds names of UTF-8 only")
    assert len(sound()._store.names) == 4
