"""Text to ids and back, saved as standard files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybridnas.data.tokenizers import (
    ByteTokenizer,
    StreamDecoder,
    byte_symbols,
    find_tokenizer,
    load_tokenizer,
    train_bpe,
)
from hybridnas.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SAMPLE = ["def encode(self, text):\n    return text\n", "größer als naïve ☃ 数学\n"] * 40


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(SAMPLE, 300)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer in the manner of SentencePiece: no byte-level decoder, bytes as a last resort."""
    fast = Fast(models.BPE(byte_fallback=True, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    fast.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    return fast


@given(TEXT)
def test_bytes_are_the_ids_of_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == np.frombuffer(text.encode(), dtype=np.uint8).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text.encode()])[0].tolist() == ids


@given(TEXT)
def test_the_saved_byte_tokenizer_of_the_tokenizers_library_gives_the_same_ids(text):
    fast = Fast.from_str(ByteTokenizer().to_json())
    assert fast.encode(text).ids == ByteTokenizer().encode(text)
    assert fast.decode(fast.encode(text).ids) == text


def test_the_symbol_of_every_byte_has_that_byte_as_its_id():
    fast = Fast.from_str(ByteTokenizer().to_json())
    assert fast.get_vocab_size() == 256
    assert [fast.token_to_id(symbol) for symbol in byte_symbols()] == list(range(256))
    assert sorted(byte_symbols()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@given(text=TEXT)
@settings(deadline=None)
def test_bpe_gives_every_text_back_unchanged(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 < token < bpe.vocab_size for token in ids)
    assert bpe.encode_batch([text.encode()])[0].tolist() == ids
    assert b"".join(bpe.token_bytes(token) for token in ids) == text.encode()


def test_bpe_has_the_size_asked_and_shortens_text_it_was_trained_on(bpe):
    assert bpe.vocab_size == 300
    assert bpe.separator == 0
    assert len(bpe.encode(SAMPLE[0])) < len(SAMPLE[0]) / 2


def test_bpe_trained_twice_is_the_same(bpe):
    assert train_bpe(SAMPLE, 300).fingerprint == bpe.fingerprint


def test_bpe_below_257_tokens_is_refused():
    with pytest.raises(DataError, match="vocab_size=256 is too small for BPE: 256 bytes and a separator need 257"):
        train_bpe(SAMPLE, 256)


def test_text_that_names_the_separator_does_not_end_there(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.separator not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_as_what_it_was(tmp_path, bpe, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("kind", "vocab_size", "separator", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded.encode("naïve <|endoftext|>") == tokenizer.encode("naïve <|endoftext|>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_reads_the_saved_tokenizer_alike(tmp_path, bpe, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def größer(x):\n    return  'Ā☃ '\n"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_of_others_is_found_by_folder_or_file(tmp_path, pieces):
    pieces.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = find_tokenizer(str(place))
        assert tokenizer.separator == pieces.token_to_id("</s>")
        assert tokenizer.vocab_size == pieces.get_vocab_size()


def test_the_separator_is_the_declared_end_of_text_unless_the_user_names_one(tmp_path, pieces):
    pieces.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<unk>"}}))
    assert find_tokenizer(str(tmp_path)).separator == pieces.token_to_id("<unk>")
    assert find_tokenizer(str(tmp_path), separator="</s>").separator == pieces.token_to_id("</s>")
    with pytest.raises(DataError, match=r"has no token '<end>'; choose another data.separator"):
        find_tokenizer(str(tmp_path), separator="<end>")


def test_a_tokenizer_that_ends_no_text_asks_for_a_separator(tmp_path):
    Fast(models.WordLevel({"a": 0, "b": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"names no end-of-text token to put after documents; set data.separator=TOKEN"):
        find_tokenizer(str(tmp_path))


def test_an_unknown_tokenizer_says_what_needs_no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'byte' is not bytes, bpe, nor a file or folder here; did you mean 'bytes'"):
        find_tokenizer("byte")
    with pytest.raises(DataError, match=r"no/such-name.*could not be fetched.*data.tokenizer=bpe need no network"):
        find_tokenizer("no/such-name")
    with pytest.raises(DataError, match=r"data.tokenizer='./nowhere' does not exist"):
        find_tokenizer("./nowhere")
    with pytest.raises(DataError, match=r"no tokenizer at .*: it has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer that the tokenizers library reads"):
        load_tokenizer(tmp_path)


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@given(text=TEXT)
@settings(deadline=None)
def test_streamed_text_joins_to_the_whole_without_half_characters(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        said = stream(tokenizer, tokenizer.encode(text))
        assert "".join(said) == text
        assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in said)


@given(ids=st.lists(st.integers(0, 299), max_size=40))
@settings(deadline=None)
def test_streaming_any_ids_at_all_says_what_decoding_them_says(bpe, ids):
    assert "".join(stream(bpe, ids)) == bpe.decode(ids)
    shorter = [token % 256 for token in ids]
    assert "".join(stream(ByteTokenizer(), shorter)) == ByteTokenizer().decode(shorter)


def test_streaming_without_byte_level_keeps_spaces_and_whole_characters(tmp_path, pieces):
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "größer als 数学 and naïve 🙂 return text"
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes(ids[0]) is None
    said = stream(tokenizer, ids)
    assert "".join(said) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in said)
