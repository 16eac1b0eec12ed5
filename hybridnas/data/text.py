"""``data=text``: the user's own files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybridnas.data.config import DataConfig
from hybridnas.data.files import FileCorpus
from hybridnas.data.opening import COMPRESSED, CorpusFile, is_archive, members
from hybridnas.data.remote import fetched, is_remote
from hybridnas.data.rows import READERS
from hybridnas.data.source import Source, register_source
from hybridnas.data.windows import open_text
from hybridnas.errors import DataError
from hybridnas.files import cache_home

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")
# What is taken of a folder or an archive; a glob takes whatever it matches. A .json in a folder is rarely text.
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *(suffix for suffix in READERS if suffix != ".json"))


@register_source("text", config=DataConfig)
def open_files(config: DataConfig) -> Source:
    """Open the files that ``config.path`` names; raises DataError where nothing matches."""
    assert config.path is not None
    return open_text(FileCorpus(text_files(config.path, cache=config.cache), config, name=_words(config.path)), config)


def text_files(
    path: str | tuple[str, ...], suffixes: Sequence[str] = FOLDER_SUFFIXES, *, cache: Path | None = None
) -> list[CorpusFile]:
    """Return the files that a path, folder, glob, URL, or several of them name: each once, sorted.

    ``suffixes``: of the files that are taken out of a folder or an archive. ``cache``: where what a URL names is kept;
    none: the usual one.
    """
    found: dict[tuple[Path, str], CorpusFile] = {}
    for part in _parts(path):
        before = len(found)
        matches = 0
        for file in _match(part, suffixes, cache or cache_home()):
            matches += 1
            found.setdefault((file.path.resolve(), file.member), file)
        if not matches and before == len(found):
            raise DataError(_nothing(part, suffixes), field="data.path", got=part)
    return sorted(found.values(), key=lambda file: (file.key, str(file.path)))


def _parts(path: str | tuple[str, ...]) -> list[str]:
    if isinstance(path, tuple):
        return list(path)
    if Path(path).expanduser().exists():  # a name that has a comma itself
        return [path]
    return [part.strip() for part in path.split(",") if part.strip()]


def _match(part: str, suffixes: Sequence[str], cache: Path) -> Iterator[CorpusFile]:
    path = Path(part).expanduser()
    if is_remote(part):
        for copy in fetched(part, suffixes, cache):
            yield from (one._replace(url=copy.url) for one in _unpacked(copy.path, copy.key, suffixes))
    elif path.is_file():
        yield from _unpacked(path, path.name, suffixes)
    elif path.is_dir():
        yield from _within(path, suffixes)
    else:
        for match in glob.iglob(str(path), recursive=True):  # noqa: PTH207 - Path.glob takes no absolute pattern
            if Path(match).is_file():
                yield from _unpacked(Path(match), Path(match).as_posix(), suffixes)


def _unpacked(path: Path, key: str, suffixes: Sequence[str]) -> Iterator[CorpusFile]:
    """Yield a file, or the files of these suffixes in an archive."""
    if is_archive(path):
        yield from (file for file in members(path, key) if file.suffix in suffixes)
    else:
        yield CorpusFile(path, key)


def _within(root: Path, suffixes: Sequence[str]) -> Iterator[CorpusFile]:
    """Yield the files of these suffixes in a folder and in what its links lead to: none hidden, each folder once."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise DataError(
            f"cannot read folder {error.filename}: {error.strerror}; change its permissions, or leave it out of "
            f"data.path",
            field="data.path",
            got=str(error.filename),
        )

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = Path(folder).resolve()
        if real in seen:  # links in a circle, or two to one place
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = CorpusFile(Path(folder, name), Path(folder, name).relative_to(root).as_posix())
            if not name.startswith(".") and file.suffix in suffixes and file.path.is_file():
                yield file


def _nothing(part: str, suffixes: Sequence[str]) -> str:
    path = Path(part).expanduser()
    if path.is_dir():
        kind = "text " if suffixes is FOLDER_SUFFIXES else ""
        return (
            f"data.path={part!r} is a folder without {kind}files ({', '.join(suffixes)}, or these with "
            f"{', '.join(COMPRESSED)}); "
            f"name other files by a glob, e.g. data.path='{part.rstrip('/')}/**/*'"
        )
    return f"data.path={part!r} matches no file; give a file, a folder, or a glob in quotes"


def _words(path: str | tuple[str, ...]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
