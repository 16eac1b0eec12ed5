"""``data=hub``: a dataset of the Hugging Face hub, streamed once into the cache, then read like any file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridnas.data.cache import explaining_disk, lock, publish_folder, read_json, remove, temporary
from hybridnas.data.config import DEFAULT_HUB_BYTES, DataConfig
from hybridnas.data.files import FileCorpus
from hybridnas.data.network import why_offline
from hybridnas.data.opening import CorpusFile
from hybridnas.data.progress import reporting
from hybridnas.data.rows import BadRowError, LeftOut, row_text
from hybridnas.data.source import Source, register_source
from hybridnas.data.windows import open_text
from hybridnas.errors import DataError
from hybridnas.files import write_json
from hybridnas.units import several

_OFFLINE_WAYS = "data=stdlib and data=text data.path=FILES need no network"


@register_source("hub", config=DataConfig)
def open_hub(config: DataConfig) -> Source:
    """Open a hub dataset's text; raises DataError without network, unless it was read before."""
    path = spool(config)
    left_out = int((read_json(path.parent / "meta.json") or {}).get("left_out", 0))
    name = (
        f"{_words(config)} (without {several(left_out, 'row')} that could not be read)" if left_out else _words(config)
    )
    file = CorpusFile(path, "documents.jsonl")
    return open_text(FileCorpus([file], config.replace(text_field="text", skip_bad_rows=None), name=name), config)


def spool(config: DataConfig) -> Path:
    """Return the file of the dataset's documents, one JSON line each, streamed now unless it is there.

    The first documents up to ``max_bytes`` are taken: trials and tokenizers then share them without a network.
    """
    limit = config.max_bytes or DEFAULT_HUB_BYTES
    key = [1, config.name, config.config, config.split, config.revision, config.text_field, limit]
    if config.chat_template is not None:
        key.append(config.chat_template)
    if config.skip_bad_rows:
        key.append("skip_bad_rows")
    folder = config.cache / "hub" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = folder / "documents.jsonl"
    with explaining_disk(config.cache), lock(folder):
        if not _sound(folder):
            remove(folder)
            building = temporary(folder)
            building.mkdir(parents=True)
            try:
                counts = _stream(config, building / file.name, limit)
                write_json(building / "meta.json", {**counts, "dataset": key})
                publish_folder(building, folder)
            finally:
                remove(building)
    return file


def _sound(folder: Path) -> bool:
    meta = read_json(folder / "meta.json")
    file = folder / "documents.jsonl"
    return meta is not None and file.is_file() and file.stat().st_size == meta.get("size")


def _stream(config: DataConfig, file: Path, limit: int) -> dict[str, int]:
    taken = count = 0
    left_out = LeftOut()
    with file.open("w", encoding="utf-8") as handle, reporting(f"fetching {config.name}", limit) as report:
        for number, row in enumerate(_rows(config), start=1):
            try:
                raw = row_text(row, config, f"dataset {_words(config)} row {number}")
            except BadRowError as error:
                if not config.skip_bad_rows:
                    raise
                left_out.add(error)
                continue
            if raw:
                handle.write(json.dumps({"text": raw.decode()}, ensure_ascii=False) + "\n")
                taken, count = taken + len(raw), count + 1
                report(taken)
            if taken >= limit:
                break
    if not count:
        why = f"; the first row left out: {left_out.first}" if left_out.count else ""
        raise DataError(
            f"dataset {_words(config)} has no text in field {config.text_field!r}; choose another split{why}"
        )
    counts = {"size": file.stat().st_size, "documents": count}
    return {**counts, "left_out": left_out.count} if left_out.count else counts


def _rows(config: DataConfig) -> Iterator[Any]:
    assert config.name is not None
    if not Path(config.name).is_dir() and (reason := why_offline()):
        raise DataError(f"data=hub data.name={config.name} cannot be fetched, because {reason}; {_OFFLINE_WAYS}")
    import datasets

    try:
        yield from datasets.load_dataset(
            config.name, config.config, split=config.split, revision=config.revision, streaming=True
        )
    except Exception as error:  # the library raises many kinds: network, names, formats
        words = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"dataset {_words(config)} cannot be read: {words}; {_OFFLINE_WAYS}") from None


def _words(config: DataConfig) -> str:
    return " ".join(filter(None, (config.name, config.config, config.split)))
