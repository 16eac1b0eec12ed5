"""What data holds, for people before they train: figures, shares, parts and samples.

Scripts of letters are those of the Unicode character's name (``LATIN SMALL LETTER A``), after compatibility forms are
folded (NFKC): no model of languages is needed, and none is guessed.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridnas.data.copies import Hashes, near_copies, sketch
from hybridnas.data.progress import reporting

if TYPE_CHECKING:
    from hybridnas.data.files import FileCorpus

SAMPLES = 10
SAMPLE_BYTES = 500  # of a document that are shown


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An example of the data: where it stands, and what it is."""

    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Details:
    """What data holds, ready for JSON: numbers by name, with the unit in the name or in square brackets."""

    figures: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # train, valid, test -> figures
    shares: Mapping[str, float] = field(default_factory=dict)  # name -> share [0 to 1], largest first
    shares_of: str = ""  # what the shares are of
    samples: Sequence[Sample] = ()


def text_details(corpus: FileCorpus, samples: int, seed: int) -> Details:
    """Return what a corpus of text holds, by one reading of its documents; the parts are left to the caller.

    An exact duplicate has the bytes of an earlier document; a near one belongs to a group of near copies
    (:mod:`hybridnas.data.copies`) that an earlier document belongs to.
    """
    sizes: list[int] = []
    digests: list[bytes] = []
    sketches: list[Hashes] = []
    plain_256 = np.zeros(256, dtype=np.int64)
    others: Counter[str] = Counter()
    done = 0
    kept: list[tuple[int, int, bytes]] = []  # draw, number, document: those of the smallest draws
    with reporting("describing", corpus.survey().size) as report:
        for number, document in enumerate(corpus.documents()):
            digest = hashlib.sha256(document).digest()
            sizes.append(len(document))
            digests.append(digest[:16])
            sketches.append(sketch(document))
            if document.isascii():
                plain_256 += np.bincount(np.frombuffer(document, dtype=np.uint8), minlength=256)
            else:
                others.update(document.decode("utf-8", "replace"))
            draw = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little")
            if len(kept) < samples or (kept and draw < kept[-1][0]):
                kept = sorted([*kept, (draw, number, document)])[:samples]
            done += len(document)
            report(done)
    letters, shares = scripts(Counter({chr(code): int(n) for code, n in enumerate(plain_256) if n}) + others)
    characters = int(plain_256.sum()) + others.total()
    distinct = len(set(digests))
    group = near_copies(sketches)
    first = {digest: int(own) for digest, own in zip(reversed(digests), reversed(group.tolist()), strict=True)}
    groups = len({first[digest] for digest in digests})
    figures = {
        "documents": len(sizes),
        "bytes": sum(sizes),
        "bytes of the median document": int(np.median(sizes)),
        "bytes of the longest document": max(sizes),
        "characters": characters,
        "share of letters": letters / max(1, characters),
        "exact duplicates": len(sizes) - distinct,
        "near duplicates": distinct - groups,
        "rows left out": corpus.left_out.count,
        "files left out": len(corpus.survey().bad),
    }
    shown = [
        Sample(
            where=f"document {number + 1:,} of {len(sizes):,}, {len(document):,} bytes",
            text=document[:SAMPLE_BYTES].decode("utf-8", "ignore"),
        )
        for _, number, document in sorted(kept, key=lambda one: one[1])
    ]
    return Details(figures=figures, shares=shares, shares_of="scripts of letters", samples=shown)


def scripts(characters: Mapping[str, int]) -> tuple[int, dict[str, float]]:
    """Return how many of the characters are letters, and the share of each script among these, largest first."""
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        folded = unicodedata.normalize("NFKC", character)[:1]
        if folded and unicodedata.category(folded).startswith("L"):
            script = unicodedata.name(folded, "unnamed").split()[0].split("-")[0]
            counts[script if script == "CJK" else script.capitalize()] += count
    letters = counts.total()
    return letters, {script: count / max(1, letters) for script, count in counts.most_common()}
