"""``data=text``: the user's own files, folders and globs."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from hybridnas.data.config import DataConfig
from hybridnas.data.files import ROW_SUFFIXES, CorpusFile, FileCorpus, inner_suffix
from hybridnas.data.source import Source, register_source
from hybridnas.data.windows import open_text
from hybridnas.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)  # what is taken of a folder; a glob takes whatever it matches


@register_source("text", config=DataConfig)
def open_files(config: DataConfig) -> Source:
    """Open the files that ``config.path`` names; raises DataError where nothing matches."""
    assert config.path is not None
    return open_text(FileCorpus(text_files(config.path), config, name=_words(config.path)), config)


def text_files(path: str | tuple[str, ...]) -> list[CorpusFile]:
    """Return the files that a path, folder, glob, or several of them name: each once, sorted."""
    found: dict[Path, CorpusFile] = {}
    for part in _parts(path):
        before = len(found)
        matches = 0
        for file in _match(part):
            matches += 1
            found.setdefault(file.path.resolve(), file)
        if not matches and before == len(found):
            raise DataError(_nothing(part))
    return sorted(found.values(), key=lambda file: (file.key, str(file.path)))


def _parts(path: str | tuple[str, ...]) -> list[str]:
    if isinstance(path, tuple):
        return list(path)
    if Path(path).expanduser().exists():  # a name that has a comma itself
        return [path]
    return [part.strip() for part in path.split(",") if part.strip()]


def _match(part: str) -> Iterator[CorpusFile]:
    path = Path(part).expanduser()
    if path.is_file():
        yield CorpusFile(path, path.name)
    elif path.is_dir():
        for file in path.rglob("*"):
            inner = file.relative_to(path)
            hidden = any(piece.startswith(".") for piece in inner.parts)
            if not hidden and inner_suffix(file) in FOLDER_SUFFIXES and file.is_file():
                yield CorpusFile(file, inner.as_posix())
    else:
        for match in glob.iglob(str(path), recursive=True):  # noqa: PTH207 - Path.glob takes no absolute pattern
            if Path(match).is_file():
                yield CorpusFile(Path(match), Path(match).as_posix())


def _nothing(part: str) -> str:
    path = Path(part).expanduser()
    if path.is_dir():
        return (
            f"data.path={part!r} is a folder without text files ({', '.join(FOLDER_SUFFIXES)}, or these with .gz); "
            f"name other files by a glob, e.g. data.path='{part.rstrip('/')}/**/*'"
        )
    return f"data.path={part!r} matches no file; give a file, a folder, or a glob in quotes"


def _words(path: str | tuple[str, ...]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
