"""Documents out of files: plain text, and rows of the formats in :mod:`hybridnas.data.rows`; packed or not.

A document is one file or one row, as UTF-8 bytes. Long files are cut at line ends where the config says so, and inside
a line where it is longer than a document should be.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hybridnas.data.cache import explaining_disk, read_json
from hybridnas.data.config import DataConfig
from hybridnas.data.opening import UNSOUND, CorpusFile, NotTextError, check_growth, open_packed, open_text
from hybridnas.data.progress import reporting
from hybridnas.data.rows import READERS, TABLES, LeftOut, read_rows
from hybridnas.files import write_json

PIECE_BYTES = (1024, 32 * 1024)  # a cut file's documents: a 256th of the corpus, within these bounds
FEW_FILES = 16  # fewer files than this are too few to hold whole ones out, so they are cut
_BLOCK = 1024 * 1024


class Survey(NamedTuple):
    """What one reading of all files found: identity of the content, bytes to read, files that are not text."""

    fingerprint: str
    size: int
    bad: tuple[str, ...]


class FileCorpus:
    """Files in a fixed order, read as documents; equal content has an equal fingerprint wherever it lies."""

    def __init__(self, files: Sequence[CorpusFile], config: DataConfig, *, name: str) -> None:
        self.name = name
        self.files = list(files)
        plain = [file for file in self.files if file.suffix not in READERS]
        self.cut = config.split_files == "always" or (config.split_files == "auto" and len(plain) < FEW_FILES)
        self.left_out = LeftOut()  # rows that the last reading of the documents left out
        self._config = config
        self._found: Survey | None = None

    def survey(self) -> Survey:
        """Read every file once, or recall the result while no file's name, size or date has changed.

        Raises DataError naming the first file that is not text, unless such files are skipped.
        """
        if self._found is None:
            record = self._config.cache / "surveys" / f"{self._stamp()}.json"
            known = read_json(record)
            if known is not None and set(known) == {"fingerprint", "size", "bad"}:
                self._found = Survey(str(known["fingerprint"]), int(known["size"]), tuple(known["bad"]))
            else:
                self._found = self._read_all()
                with explaining_disk(self._config.cache):
                    write_json(record, {**self._found._asdict(), "bad": list(self._found.bad)})
        return self._found

    def describe(self) -> str:
        """Return the corpus' name, and how many files were left out of it."""
        bad = len(self.survey().bad)
        return f"{self.name} (without {bad:,} file{'s' * (bad > 1)} not text)" if bad else self.name

    def documents(self) -> Iterator[bytes]:
        """Yield the documents in order, none of them empty, up to the config's ``max_bytes`` in all."""
        bad = set(self.survey().bad)
        self.left_out = LeftOut()
        left = self._config.max_bytes
        piece = min(max(self.survey().size // 256, PIECE_BYTES[0]), PIECE_BYTES[1]) if self.cut else None
        for file in self.files:
            if file.key in bad:
                continue
            for raw in read_documents(file, self._config, piece_bytes=piece, left_out=self.left_out):
                if left is not None and len(raw) >= left:
                    yield raw[:left].decode("utf-8", "ignore").encode()  # never half a character
                    return
                left = None if left is None else left - len(raw)
                yield raw

    def _stamp(self) -> str:
        listed = [self._settings()]
        for file in self.files:
            stat = file.path.stat()
            listed.append([str(file.path.absolute()), file.member, stat.st_size, stat.st_mtime_ns])
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def _settings(self) -> list[Any]:
        config = self._config
        how: list[Any] = [config.encoding, config.chat_template]
        how += ["skip_bad_rows"] if config.skip_bad_rows else []
        return [3, self.cut, config.text_field, config.max_bytes, config.skip_bad_files, *how]

    def _read_all(self) -> Survey:
        content = hashlib.sha256(json.dumps(self._settings()).encode())
        bad: list[str] = []
        size = plain = 0
        with reporting("reading", sum(file.packed_size() for file in self.files)) as report:
            for file in self.files:
                limit = self._config.max_bytes
                if limit is not None and plain >= limit:
                    break  # the rest is not read, so it is not looked at either
                is_rows = file.suffix in READERS
                try:
                    digest, length = _check(file, self._config, None if limit is None else limit - plain)
                except NotTextError:
                    if not self._config.skip_bad_files:
                        raise
                    bad.append(file.key)
                    continue
                content.update(f"{file.suffix if is_rows else 'text'} {digest}\n".encode())
                size += length
                plain += 0 if is_rows else length
                report(size)
        return Survey(content.hexdigest(), size, tuple(bad))


def read_documents(
    file: CorpusFile, config: DataConfig, *, piece_bytes: int | None, left_out: LeftOut | None = None
) -> Iterator[bytes]:
    """Yield a file's documents that are not empty, as UTF-8 bytes; plain text in pieces, or (None) whole."""
    if file.suffix in READERS:
        documents = read_rows(file, config, left_out)
    else:
        documents = _pieces(file, config, piece_bytes) if piece_bytes else iter([_read_whole(file, config)])
    yield from (document for document in documents if document)


def _read_whole(file: CorpusFile, config: DataConfig) -> bytes:
    with open_text(file, config.encoding) as handle:
        return handle.read()


def _pieces(file: CorpusFile, config: DataConfig, piece_bytes: int) -> Iterator[bytes]:
    """Yield about ``piece_bytes`` at a time, at most twice that: cut after a line, and never inside a character."""
    with open_text(file, config.encoding) as handle:
        while raw := handle.read(piece_bytes):
            raw += handle.readline(piece_bytes)
            while _continues(handle):
                raw += handle.read(1)
            yield raw


def _continues(handle: Any) -> bool:
    following = handle.peek(1)[:1]
    return bool(following) and 0x80 <= following[0] < 0xC0


def _check(file: CorpusFile, config: DataConfig, limit: int | None) -> tuple[str, int]:
    """Return sha256 and length of a file's unpacked text, up to ``limit``; raises NotTextError for a binary one."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    length, rows = 0, file.suffix in READERS
    packed = file.packed_size()
    with open_packed(file) if file.suffix in TABLES else open_text(file, config.encoding) as handle:
        try:
            while block := handle.read(_BLOCK if limit is None or rows else min(_BLOCK, limit - length)):
                if not rows:
                    _check_text(block, decoder, file, length)
                digest.update(block)
                length += len(block)
                check_growth(file, packed, length)
        except UNSOUND as error:
            raise NotTextError(f"{file.place} is not soundly packed ({error}); unpack or remove it") from None
    if not rows and (limit is None or length < limit):
        _check_text(b"", decoder, file, length, final=True)
    return digest.hexdigest(), length


def _check_text(block: bytes, decoder: Any, file: CorpusFile, offset: int, *, final: bool = False) -> None:
    path = file.place
    fix = "set data.encoding, convert it to UTF-8, leave it out of data.path, or set data.skip_bad_files=true"
    if (zero := block.find(0)) >= 0:
        raise NotTextError(f"{path} is not text: byte 0x00 at offset {offset + zero}; {fix}")
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], offset - pending + error.start
        raise NotTextError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {place}; {fix}") from None
