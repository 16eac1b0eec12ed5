"""Tokenizers: bytes, BPE trained on the corpus, any Hugging Face one; all saved as a standard ``tokenizer.json``.

Beside it lies ``tokenizer_config.json``, which transformers reads as well. No pickle, no code in either.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.data.cache import explaining_disk, read_json
from hybridnas.data.sound import ENCODINGS, Coding
from hybridnas.errors import DataError, suggest
from hybridnas.files import write_json, write_text

Ids = npt.NDArray[np.unsignedinteger[Any]]
END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
_SMALLEST_BPE = 257  # 256 bytes and the separator
_HELD_TOKENS = 16  # of a decoder that is not byte-level: no character is spread over more


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back; ``separator`` is the id put after every document."""

    kind: str
    vocab_size: int
    separator: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any separator; names of special tokens in it are ordinary text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        """Return the ids of many UTF-8 documents, one array for each."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes | None:
        """Return the bytes that one id stands for, or None where that depends on its neighbours."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the mapping from text to ids."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``, as the ``tokenizers`` library reads it."""

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder."""
        with explaining_disk(folder):
            write_text(folder / "tokenizer.json", self.to_json())
            write_json(folder / "tokenizer_config.json", self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "hybridnas": {"kind": self.kind, "separator": self.separator, "vocab_size": self.vocab_size},
        }


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of UTF-8; byte 0, which no text file holds, is the separator."""

    kind = "bytes"
    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,)) if 0 <= token < 256 else b"\xff"  # a model's vocabulary may be padded

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes, separator 0").hexdigest()

    def to_json(self) -> str:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers

        vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        fast = Fast(models.BPE(vocab=vocab, merges=[]))  # no merges, so one symbol is one id
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        return str(fast.to_str(pretty=False))


class AudioTokenizer(Tokenizer):
    """Ids of sound, which are no text: kept beside a model so that what it generates can be written as a recording."""

    kind = "audio"
    vocab_size = 256

    def __init__(self, coding: Coding) -> None:
        self.coding = coding
        self.separator = coding.silence

    def encode(self, text: str) -> list[int]:
        raise self._no_text()

    def decode(self, ids: Sequence[int]) -> str:
        raise self._no_text()

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        raise self._no_text()

    def token_bytes(self, token: int) -> bytes | None:
        return None

    def _no_text(self) -> DataError:
        return DataError(
            "this model's ids are sound, not text; 'generate ... out=FILE.wav' writes what it generates, and it is "
            "measured on data=audio",
            field="tokenizer",
            got=self.kind,
        )

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"audio {self.coding.rate} {self.coding.encoding}".encode()).hexdigest()

    def to_json(self) -> str:
        return ByteTokenizer().to_json()

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        settings["hybridnas"] |= self.coding._asdict()
        return settings


def audio_tokenizer(settings: Mapping[str, Any], where: str) -> AudioTokenizer:
    """Return the tokenizer that was saved with these settings; raises DataError, which names ``where``, for others."""
    rate, encoding = settings.get("rate"), settings.get("encoding")
    if not isinstance(rate, int) or rate < 1 or encoding not in ENCODINGS:
        raise DataError(
            f"{where} is of sound with rate={rate!r} and encoding={encoding!r}; export the model again",
            field="encoding",
            got=encoding,
            allowed=ENCODINGS,
        )
    return AudioTokenizer(Coding(rate, str(encoding)))


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library: one that we trained, or anybody's."""

    def __init__(self, fast: Any, *, separator: int, kind: str = "huggingface") -> None:
        self.kind = kind
        self.separator = separator
        fast.encode_special_tokens = True  # a document that mentions <|endoftext|> does not end there
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode([int(token) for token in ids], skip_special_tokens=False))

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        texts = [document.decode("utf-8", "replace") for document in documents]
        encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes | None:
        return self._byte_table.get(int(token)) if self._byte_table is not None else None

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.separator} {self.to_json()}".encode()).hexdigest()

    def to_json(self) -> str:
        return str(self._fast.to_str(pretty=False))

    def _settings(self) -> dict[str, Any]:
        end = self._fast.id_to_token(self.separator)
        return {**super()._settings(), "eos_token": end}

    @cached_property
    def _byte_table(self) -> dict[int, bytes] | None:
        """Id to bytes, where the decoder works byte by byte; None otherwise (SentencePiece and its like)."""
        decoder = json.loads(self.to_json()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        value = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        added = {token: str(entry.content).encode() for token, entry in self._fast.get_added_tokens_decoder().items()}
        table = {}
        for symbols, token in self._fast.get_vocab(with_added_tokens=True).items():
            known = all(symbol in value for symbol in symbols)
            table[token] = bytes(value[symbol] for symbol in symbols) if known else symbols.encode()
        return {**table, **added}


class StreamDecoder:
    """Text of ids that arrive one by one: prints whole characters only, and nothing is lost or printed twice.

    The pieces of ``push`` and the rest from ``finish`` join to ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._by_bytes = tokenizer.token_bytes(0) is not None
        self._held: list[int] = []
        self._shown = 0  # of the held ids, those that were printed: kept because they shape how the next decode

    def push(self, token: int) -> str:
        """Return the text that is certain now."""
        if self._by_bytes:
            return self._bytes.decode(self._tokenizer.token_bytes(token) or b"")
        self._held.append(token)
        new = self._new_text()
        if new.endswith("\ufffd") and len(self._held) - self._shown < _HELD_TOKENS:
            return ""
        self._held, self._shown = self._held[self._shown :], len(self._held) - self._shown
        return new

    def finish(self) -> str:
        """Return what was held back, unfinished characters as U+FFFD."""
        if self._by_bytes:
            return self._bytes.decode(b"", True)
        new = self._new_text()
        self._held, self._shown = [], 0
        return new

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._held[: self._shown])
        return self._tokenizer.decode(self._held)[len(before) :]


def byte_symbols() -> list[str]:
    """Return the printable character that ByteLevel tokenizers write for each of the 256 bytes (GPT-2's table)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens; id 0 is the separator ``<|endoftext|>``.

    A text too small for so many merges gives fewer. Raises DataError below 257 tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_BPE:
        raise DataError(f"vocab_size={vocab_size} is too small for BPE: 256 bytes and a separator need {_SMALLEST_BPE}")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer=trainer)
    return FastTokenizer(fast, separator=0, kind="bpe")


def load_tokenizer(folder: Path | str, *, separator: str | None = None) -> Tokenizer:
    """Load what ``save`` wrote, or a Hugging Face tokenizer from its folder or ``tokenizer.json``.

    Raises DataError where the file is missing or damaged, or where no token ends a text.
    """
    file = Path(folder)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"no tokenizer at {folder}: it has no tokenizer.json")
    settings = read_json(file.parent / "tokenizer_config.json") or {}
    ours = settings.get("hybridnas") or {}
    if ours.get("kind") == ByteTokenizer.kind and separator is None:
        return ByteTokenizer()
    if ours.get("kind") == "audio":
        return audio_tokenizer(ours, str(file.parent))
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from None
    if "separator" in ours and separator is None:
        return FastTokenizer(fast, separator=int(ours["separator"]), kind=str(ours.get("kind", "huggingface")))
    return FastTokenizer(fast, separator=_find_end(fast, separator, settings.get("eos_token"), str(folder)))


def find_tokenizer(name: str, *, separator: str | None = None) -> Tokenizer:
    """Return ``bytes``, or the Hugging Face tokenizer of this path or name, from the cache or the network.

    Raises DataError where it cannot be had, saying which tokenizers need no network.
    """
    if name == ByteTokenizer.kind:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.exists():
        return load_tokenizer(path, separator=separator)
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise DataError(f"data.tokenizer={name!r} does not exist; give a folder with a tokenizer.json, or the file")
    from hybridnas.data.network import fetch_tokenizer

    try:
        folder = fetch_tokenizer(name)
    except DataError as error:
        close = suggest(name, ("bytes", "bpe")) if len(name) < 8 else ""
        close = close if "mean" in close else ""
        raise DataError(
            f"data.tokenizer={name!r} is not bytes, bpe, nor a file or folder here{close}; {error}; "
            f"data.tokenizer=bytes and data.tokenizer=bpe need no network"
        ) from None
    return load_tokenizer(folder, separator=separator)


def _find_end(fast: Any, wanted: str | None, declared: Any, where: str) -> int:
    if isinstance(declared, dict):  # how transformers writes a token with options
        declared = declared.get("content")
    names = (wanted,) if wanted else tuple(filter(None, (declared, *_KNOWN_ENDS)))
    for name in names:
        token = fast.token_to_id(name)
        if token is not None:
            return int(token)
    if wanted:
        raise DataError(f"tokenizer {where} has no token {wanted!r}; choose another data.separator")
    raise DataError(f"tokenizer {where} names no end-of-text token to put after documents; set data.separator=TOKEN")
