"""Losses of the test part by document, kept beside a run in ``documents.json``: what an interval over documents needs.

A document is a text of the corpus as it was split (a piece, where long files are cut), or one example of a task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridnas.errors import StudyError
from hybridnas.files import write_text

FILE = "documents.json"


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the measured places of each document; the four sequences are of equal length."""

    documents: Sequence[int]  # number in the test part, rising
    nats: Sequence[float]  # sum of -log p(target)
    tokens: Sequence[int]  # places that counted, at least one
    bytes: Sequence[int]  # UTF-8 bytes that these stand for; zeros where the data has none

    def same_places(self, other: DocumentSums) -> bool:
        """Whether both are sums over the same documents with the same number of places in each."""
        return list(self.documents) == list(other.documents) and list(self.tokens) == list(other.tokens)


def write_documents(folder: Path, sums: DocumentSums) -> Path:
    """Write ``documents.json`` atomically; raises OSError when the disk refuses."""
    path = folder / FILE
    values = {"part": "test", **{name: list(getattr(sums, name)) for name in ("documents", "nats", "tokens", "bytes")}}
    write_text(path, json.dumps(values, allow_nan=False) + "\n")
    return path


def read_documents(folder: Path) -> DocumentSums | None:
    """Return what a run kept; None where it kept nothing, as runs of older versions and data without a test part.

    Raises StudyError for a file that is damaged.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sums = DocumentSums(values["documents"], values["nats"], values["tokens"], values["bytes"])
        lengths = {len(sums.documents), len(sums.nats), len(sums.tokens), len(sums.bytes)}
        if len(lengths) != 1 or not all(count > 0 for count in sums.tokens):
            raise ValueError("its columns differ in length, or a document has no places")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it, and the report states no interval "
            f"over documents",
            field="documents",
            got=str(path),
        ) from None
    return sums
