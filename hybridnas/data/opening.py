"""Files as streams of UTF-8 bytes, whatever they are packed in and however they are encoded.

A corpus file is a file on disk or a member of a zip or tar archive; either may be compressed (gz, bz2, xz, zst).
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from hybridnas.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class UnsoundError(Exception):
    """What bz2 and zstd raise as an OSError without a number where a file is damaged."""


UNSOUND = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, UnsoundError)
_BOMB = (1000, 1 << 28)  # a file that grows so many times, beyond so many bytes, is no text that somebody packed
_MARKS = (  # longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotTextError(DataError):
    """A file that is not text in the encoding that was asked for."""


class CorpusFile(NamedTuple):
    """A file, the name by which it is sorted (its path inside the folder that was asked for), and its archive's member.

    ``member`` is empty where the file is no archive's; ``url`` is where a copy in the cache came from.
    """

    path: Path
    key: str
    member: str = ""
    url: str = ""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.member.rpartition("/")[2] or self.path.name

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return f"{self.url or self.path} ({self.member})" if self.member else self.url or str(self.path)

    @property
    def suffix(self) -> str:
        """Its suffix in lower case, the one before that of a compression."""
        name = self.name.lower()
        return Path(next((name.removesuffix(one) for one in COMPRESSED if name.endswith(one)), name)).suffix

    def packed_size(self) -> int:
        """Bytes on disk, of a member of a tar those in it; raises DataError where the file cannot be seen."""
        try:
            if not self.member:
                return self.path.stat().st_size
            archive = _archive(self.path)
            if isinstance(archive, zipfile.ZipFile):
                return archive.getinfo(self.member).compress_size
            return archive.getmember(self.member).size
        except OSError as error:
            raise _unreadable(self, error) from None


def is_archive(path: Path) -> bool:
    """Whether a file is an archive by its name."""
    return path.name.lower().endswith(ARCHIVES)


def members(path: Path, key: str) -> Iterator[CorpusFile]:
    """Yield the files in an archive, hidden ones left out; raises DataError for an unsound one, or a zip bomb."""
    try:
        archive = _archive(path)
    except UNSOUND as error:
        raise DataError(f"{path} is not a sound archive ({error}); mend or remove it") from None
    except OSError as error:
        raise _unreadable(CorpusFile(path, key), error) from None
    if isinstance(archive, zipfile.ZipFile):
        found = [(one.filename, one.file_size, one.compress_size) for one in archive.infolist() if not one.is_dir()]
    else:
        found = [(one.name, one.size, one.size) for one in archive.getmembers() if one.isfile()]
    for name, size, packed in sorted(found):
        check_growth(CorpusFile(path, key, name), packed, size)
        if not any(part.startswith(".") for part in name.split("/") if part != "."):
            yield CorpusFile(path, f"{key}/{name}", name)


def open_packed(file: CorpusFile) -> IO[bytes]:
    """Open a file's own bytes, out of its archive but compressed as they are; raises DataError."""
    try:
        if not file.member:
            return file.path.open("rb")
        archive = _archive(file.path)
        if isinstance(archive, zipfile.ZipFile):
            return archive.open(file.member)
        return cast(IO[bytes], archive.extractfile(file.member))
    except OSError as error:
        raise _unreadable(file, error) from None
    except RuntimeError as error:  # zipfile's word for a member with a password
        raise DataError(f"{file.place} cannot be read: {error}; unpack it yourself") from None


def open_bytes(file: CorpusFile) -> IO[bytes]:
    """Open a file's bytes, decompressed; raises DataError."""
    packing = next((one for one in COMPRESSED if file.name.lower().endswith(one)), "")
    if not packing:
        return open_packed(file)
    source: Path | IO[bytes] = file.path
    if file.member:  # by itself: whoever closes the stream closes nothing below it
        with open_packed(file) as member:
            source = io.BytesIO(member.read())
    try:
        if packing == ".gz":
            return cast(IO[bytes], gzip.open(source))
        if packing == ".bz2":
            import bz2

            return io.BufferedReader(_Checked(bz2.open(source)))
        if packing == ".xz":
            return cast(IO[bytes], lzma.open(source))
        import pyarrow as pa  # which brings the library that decompresses it

        inner = pa.OSFile(str(source)) if isinstance(source, Path) else pa.PythonFile(source, mode="r")
        return io.BufferedReader(_Checked(pa.CompressedInputStream(inner, "zstd")))
    except OSError as error:
        raise _unreadable(file, error) from None


def open_text(file: CorpusFile, encoding: str | None) -> IO[bytes]:
    """Open a file's text as UTF-8 bytes without a byte order mark.

    ``encoding``: None takes what a byte order mark says, else the bytes as they are, which are UTF-8 if they are text;
    a name of Python's reads every file by it. Raises NotTextError while reading where it does not fit.
    """
    handle = open_bytes(file)
    try:
        head = cast(Any, handle).peek(4)[:4]
    except OSError as error:
        if not isinstance(error, UNSOUND):
            raise _unreadable(file, error) from None
        head = b""  # whoever reads on meets it again
    except UNSOUND:
        head = b""
    mark, marked = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "utf-8"))
    name = marked if encoding is None else codecs.lookup(encoding).name
    if name == "utf-8":
        if mark == codecs.BOM_UTF8:
            handle.read(len(mark))
        return handle
    return io.BufferedReader(_Recoded(handle, name, file))


class _Checked(io.RawIOBase):
    """A decompressed stream; raises UnsoundError, again at each further read, where what is packed is damaged."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._wrong: UnsoundError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._wrong is not None:
            raise self._wrong
        try:
            block = self._handle.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # the disk's
                raise
            self._wrong = UnsoundError(str(error))
            raise self._wrong from None
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._handle.close()
        super().close()


class _Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8."""

    def __init__(self, handle: IO[bytes], encoding: str, file: CorpusFile) -> None:
        self._handle, self._encoding, self._file = handle, encoding, file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read, self._ready, self._ended = 0, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._handle.read(1 << 16)
            self._ended = not block
            pending = len(self._decoder.getstate()[0])
            try:
                text = self._decoder.decode(block, self._ended)
            except UnicodeError as error:
                at = self._read - pending + getattr(error, "start", 0)
                raise NotTextError(
                    f"{self._file.place} is not text in {self._encoding}: {getattr(error, 'reason', error)} at offset "
                    f"{at}; set data.encoding, leave it out of data.path, or set data.skip_bad_files=true",
                    field="data.encoding",
                    got=self._encoding,
                ) from None
            self._read += len(block)
            self._ready = text.removeprefix("\ufeff").encode() if self._read == len(block) else text.encode()
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken

    def close(self) -> None:
        self._handle.close()
        super().close()


def check_growth(file: CorpusFile, packed: int, size: int) -> None:
    """Raise DataError where a file grows as no packed text does, so that it would fill memory and disk."""
    if size > max(_BOMB[1], _BOMB[0] * packed):
        raise DataError(
            f"{file.place} grows from {packed:,} to {size:,} bytes or more, over {_BOMB[0]} times, as a zip bomb does; "
            f"unpack it yourself if it is text",
            field="data.path",
            got=size,
            allowed=f"<= {_BOMB[0]} times",
        )


_open: dict[tuple[Path, int, int], tuple[zipfile.ZipFile | tarfile.TarFile, IO[bytes] | None]] = {}


def _archive(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    """Return an archive that stays open until another one is asked for: every one of its members is opened."""
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _open:
        for archive, unpacked in _open.values():
            archive.close()
            if unpacked is not None:
                unpacked.close()
        _open.clear()
        _open[key] = _opened(path, stat.st_size)
    return _open[key][0]


def _opened(path: Path, size: int) -> tuple[zipfile.ZipFile | tarfile.TarFile, IO[bytes] | None]:
    name = path.name.lower()
    if name.endswith(".zip"):
        return zipfile.ZipFile(path), None
    if name.endswith(".tar"):
        return tarfile.open(path), None
    # A member of a compressed tar is found by unpacking all before it, so the whole is unpacked once.
    file, grown = CorpusFile(path, path.name), 0
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as the archive
    try:
        with gzip.open(path) if name.endswith(".tgz") else open_bytes(file) as opened:
            while block := opened.read(1 << 20):
                grown += len(block)
                check_growth(file, size, grown)
                unpacked.write(block)
        unpacked.seek(0)
        return tarfile.open(fileobj=unpacked), unpacked
    except BaseException:
        unpacked.close()
        raise


def _unreadable(file: CorpusFile, error: OSError) -> DataError:
    advice = "change its permissions, or leave" if isinstance(error, PermissionError) else "leave"
    return DataError(
        f"cannot read {file.place}: {error.strerror or error}; {advice} it out of data.path",
        field="data.path",
        got=str(file.path),
    )
