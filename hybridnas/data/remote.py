"""Files in object stores and on servers: what a URL of fsspec names, streamed once into the cache.

``s3://BUCKET/FOLDER``, ``gs://...``, ``https://...``: every protocol that fsspec knows and whose package is installed.
A file is copied block by block and appears whole or not at all; one that has not changed (size, and what the store says
of its version) is not fetched again, so trials share a copy, and what was stopped goes on with the next file.
Credentials are those of the environment, as the protocol's package reads them: none belongs into a URL.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridnas.data.cache import explaining_disk, lock, publish_folder, read_json, remove, temporary
from hybridnas.data.opening import COMPRESSED, CorpusFile
from hybridnas.data.progress import reporting
from hybridnas.errors import ConfigError, DataError
from hybridnas.files import write_json

_BLOCK = 1 << 22
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")  # what stores call it


def is_remote(path: str) -> bool:
    """Whether a path is a URL of fsspec rather than a place on this machine."""
    return "://" in path and not Path(path).exists()


def fetched(url: str, suffixes: Sequence[str], cache: Path) -> list[CorpusFile]:
    """Return the files that a URL names, as copies in the cache: one file, a folder's of these suffixes, or a glob's.

    Raises DataError where there is nothing or it cannot be read, ConfigError for a protocol without its package.
    """
    filesystem, root = _opened(url)
    try:
        names = _listed(filesystem, root, suffixes)
        return [_copy(filesystem, url, root, name, cache) for name in names]
    except (ConfigError, DataError):
        raise
    except Exception as error:  # each protocol's package raises its own kinds
        raise _unreadable(url, error) from None


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "pip install 'hybridnas[s3]'" if protocol in ("s3", "s3a") else "install it"
        raise ConfigError(
            f"data.path={url!r} needs a package that is not here: {' '.join(str(error).split())}; {extra}",
            field="data.path",
            got=protocol,
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"data.path={url!r} is no URL that fsspec knows: {' '.join(str(error).split())}",
            field="data.path",
            got=protocol,
            allowed=tuple(sorted(fsspec.available_protocols())),
        ) from None
    except Exception as error:
        raise _unreadable(url, error) from None
    return filesystem, str(root)


def _listed(filesystem: Any, root: str, suffixes: Sequence[str]) -> list[str]:
    """Return the names of the files, sorted; of a folder those of these suffixes that are not hidden."""
    if any(one in root for one in "*?["):
        return sorted(name for name in filesystem.glob(root) if filesystem.isfile(name))
    if filesystem.isfile(root):
        return [root]
    found = [str(name) for name in filesystem.find(root)]
    inner = {name: posixpath.relpath(name, root) for name in found}
    return sorted(
        name
        for name, own in inner.items()
        if not any(part.startswith(".") for part in own.split("/")) and _suffix(own) in suffixes
    )


def _suffix(name: str) -> str:
    plain = next((name.removesuffix(one) for one in COMPRESSED if name.lower().endswith(one)), name)
    return posixpath.splitext(plain.lower())[1]


def _copy(filesystem: Any, url: str, root: str, name: str, cache: Path) -> CorpusFile:
    """Return a file's copy, fetched now unless it is there."""
    protocol = url.partition("://")[0]
    full = str(filesystem.unstrip_protocol(name))  # names of http are URLs already
    info = filesystem.info(name)
    version = {key: str(info[key]) for key in _VERSIONS if info.get(key) is not None}
    key = [1, protocol, name, info.get("size"), version]
    folder = cache / "remote" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = folder / posixpath.basename(name)
    with explaining_disk(cache), lock(folder):
        meta = read_json(folder / "meta.json")
        if meta is None or not file.is_file() or file.stat().st_size != meta.get("size"):
            remove(folder)
            building = temporary(folder)
            building.mkdir(parents=True)
            try:
                size = _stream(filesystem, name, building / file.name, info.get("size"))
                write_json(building / "meta.json", {"size": size, "url": full})
                publish_folder(building, folder)
            finally:
                remove(building)
    inside = posixpath.relpath(name, root) if name != root and name.startswith(root.rstrip("/") + "/") else name
    return CorpusFile(file, inside, url=full)


def _stream(filesystem: Any, name: str, target: Path, size: int | None) -> int:
    done = 0
    with target.open("wb") as handle, reporting(f"fetching {posixpath.basename(name)}", size) as report:
        for block in _blocks(filesystem, name):
            handle.write(block)
            done += len(block)
            report(done)
    if size is not None and done != size:
        raise DataError(
            f"{name} ended after {done:,} of {size:,} bytes; run the same command again to fetch it",
            field="data.path",
            got=done,
            allowed=size,
        )
    return done


def _blocks(filesystem: Any, name: str) -> Iterator[bytes]:
    """Yield a file's bytes; what the store raises becomes DataError, and is no fault of this machine's disk."""
    try:
        with filesystem.open(name, "rb") as source:
            while block := source.read(_BLOCK):
                yield block
    except Exception as error:
        raise _unreadable(name, error) from None


def _unreadable(url: str, error: Exception) -> DataError:
    words = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"data.path={url!r} cannot be read: {words}", field="data.path", got=url)
