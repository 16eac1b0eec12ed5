"""Documents out of files: plain text, json lines, and what the ``datasets`` library reads; each also gzipped.

A document is one file or one row, as UTF-8 bytes. Long files are cut at line ends where the config says so.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from hybridnas.data.cache import explaining_disk, read_json
from hybridnas.data.config import DataConfig
from hybridnas.data.progress import reporting
from hybridnas.errors import DataError, suggest
from hybridnas.files import write_json

JSON_SUFFIXES = (".jsonl", ".ndjson")
DATASETS_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
ROW_SUFFIXES = (*JSON_SUFFIXES, *DATASETS_BUILDERS)
PIECE_BYTES = (1024, 32 * 1024)  # a cut file's documents: a 256th of the corpus, within these bounds
LONGEST_LINE = 1024 * 1024  # a longer one is cut inside
FEW_FILES = 16  # fewer files than this are too few to hold whole ones out, so they are cut
_BLOCK = 1024 * 1024


class CorpusFile(NamedTuple):
    """A file, and the name by which it is sorted: its path inside the folder that was asked for."""

    path: Path
    key: str


class Survey(NamedTuple):
    """What one reading of all files found: identity of the content, bytes to read, files that are not text."""

    fingerprint: str
    size: int
    bad: tuple[str, ...]


class NotTextError(DataError):
    """A file that is not UTF-8 text."""


class FileCorpus:
    """Files in a fixed order, read as documents; equal content has an equal fingerprint wherever it lies."""

    def __init__(self, files: Sequence[CorpusFile], config: DataConfig, *, name: str) -> None:
        self.name = name
        self.files = list(files)
        plain = [file for file in self.files if inner_suffix(file.path) not in ROW_SUFFIXES]
        self.cut = config.split_files == "always" or (config.split_files == "auto" and len(plain) < FEW_FILES)
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
        left = self._config.max_bytes
        piece = min(max(self.survey().size // 256, PIECE_BYTES[0]), PIECE_BYTES[1]) if self.cut else None
        for file in self.files:
            if file.key in bad:
                continue
            for raw in read_documents(file.path, self._config.text_field, piece_bytes=piece):
                if left is not None and len(raw) >= left:
                    yield raw[:left].decode("utf-8", "ignore").encode()  # never half a character
                    return
                left = None if left is None else left - len(raw)
                yield raw

    def _stamp(self) -> str:
        listed = [self._settings()]
        for path, _ in self.files:
            stat = path.stat()
            listed.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def _settings(self) -> list[Any]:
        config = self._config
        return [2, self.cut, config.text_field, config.max_bytes, config.skip_bad_files]

    def _read_all(self) -> Survey:
        content = hashlib.sha256(json.dumps(self._settings()).encode())
        bad: list[str] = []
        size = plain = 0
        with reporting("reading", sum(file.path.stat().st_size for file in self.files)) as report:
            for file in self.files:
                limit = self._config.max_bytes
                if limit is not None and plain >= limit:
                    break  # the rest is not read, so it is not looked at either
                is_rows = inner_suffix(file.path) in ROW_SUFFIXES
                try:
                    digest, length = _check(file.path, rows=is_rows, limit=None if limit is None else limit - plain)
                except NotTextError:
                    if not self._config.skip_bad_files:
                        raise
                    bad.append(file.key)
                    continue
                content.update(f"{inner_suffix(file.path) if is_rows else 'text'} {digest}\n".encode())
                size += length
                plain += 0 if is_rows else length
                report(size)
        return Survey(content.hexdigest(), size, tuple(bad))


def inner_suffix(path: Path) -> str:
    """Return a file's suffix in lower case, the one before ``.gz`` if it is gzipped."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_documents(path: Path, text_field: str, *, piece_bytes: int | None) -> Iterator[bytes]:
    """Yield a file's documents that are not empty, as UTF-8 bytes; plain text in pieces, or (None) whole."""
    suffix = inner_suffix(path)
    if suffix in JSON_SUFFIXES:
        documents = _json_rows(path, text_field)
    elif suffix in DATASETS_BUILDERS:
        documents = _dataset_rows(path, DATASETS_BUILDERS[suffix], suffix, text_field)
    else:
        documents = _pieces(path, piece_bytes) if piece_bytes else iter([_read_whole(path)])
    yield from (document for document in documents if document)


def row_text(row: Any, text_field: str, where: str) -> bytes:
    """Return the text of a row as UTF-8; raises DataError that opens with ``where`` if there is none."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object of named fields but {type(row).__name__}")
    if text_field not in row:
        close = suggest(text_field, map(str, row)).replace("allowed", "it has")
        raise DataError(f"{where} has no field {text_field!r}{close}; set data.text_field")
    text = row[text_field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(f"{where} field {text_field!r} is {type(text).__name__}, not text; set data.text_field")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} field {text_field!r} holds half a surrogate pair, which is not text") from None


def _open(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_whole(path: Path) -> bytes:
    with _open(path) as handle:
        return handle.read()


def _pieces(path: Path, piece_bytes: int) -> Iterator[bytes]:
    """Yield about ``piece_bytes`` at a time, cut after a line, and never inside a character."""
    with _open(path) as handle:
        while raw := handle.read(piece_bytes):
            raw += handle.readline(LONGEST_LINE)
            while _continues(handle):
                raw += handle.read(1)
            yield raw


def _continues(handle: Any) -> bool:
    following = handle.peek(1)[:1]
    return bool(following) and 0x80 <= following[0] < 0xC0


def _check(path: Path, *, rows: bool, limit: int | None) -> tuple[str, int]:
    """Return sha256 and length of a file's unzipped bytes, up to ``limit``; raises NotTextError for a binary one."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    length = 0
    packed = rows and inner_suffix(path) not in JSON_SUFFIXES  # parquet and the like: datasets unzips by itself
    with path.open("rb") if packed else _open(path) as handle:
        try:
            while block := handle.read(_BLOCK if limit is None or rows else min(_BLOCK, limit - length)):
                if not rows:
                    _check_text(block, decoder, path, length)
                digest.update(block)
                length += len(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise NotTextError(f"{path} is not a sound gzip file ({error}); unzip or remove it") from None
    if not rows and (limit is None or length < limit):
        _check_text(b"", decoder, path, length, final=True)
    return digest.hexdigest(), length


def _check_text(block: bytes, decoder: Any, path: Path, offset: int, *, final: bool = False) -> None:
    fix = "convert it to UTF-8, leave it out of data.path, or set data.skip_bad_files=true"
    if (zero := block.find(0)) >= 0:
        raise NotTextError(f"{path} is not text: byte 0x00 at offset {offset + zero}; {fix}")
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], offset - pending + error.start
        raise NotTextError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {place}; {fix}") from None


def _json_rows(path: Path, text_field: str) -> Iterator[bytes]:
    with _open(path) as handle:
        try:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield row_text(_parse(line, where), text_field, where)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is not a sound gzip file ({error}); unzip or remove it") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}; mend or remove it") from None


def _dataset_rows(path: Path, builder: str, suffix: str, text_field: str) -> Iterator[bytes]:
    import datasets

    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            yield row_text(row, text_field, f"{path} row {number}")
    except DataError:
        raise
    except Exception as error:  # pyarrow and pandas raise many kinds, none of them ours
        words = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as {builder}: {words or type(error).__name__}") from None
