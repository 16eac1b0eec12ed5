"""Every error a user can meet, under one root, plus the helper that suggests the right spelling.

A message is one sentence: where, what was got, what is allowed, what to do. The command line prints it and exits
with code 2; a library user catches :class:`HybridNASError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class HybridNASError(Exception):
    """Root of all errors that hybridnas raises for a user's mistake or a machine's refusal.

    ``field`` is the setting, argument or file at fault (dotted where nested: ``budget.depth``), ``got`` the value that
    was given, ``allowed`` the values that would have been taken (names, or one string such as ``">= 1"``). Each is
    None where it does not apply; the message says the same in one sentence.
    """

    def __init__(self, message: str = "", *, field: str | None = None, got: Any = None, allowed: Any = None) -> None:
        super().__init__(message)
        self.field = field
        self.got = got
        self.allowed = allowed


class PatternError(HybridNASError):
    """A pattern string that the grammar does not allow."""


class ConfigError(HybridNASError):
    """A field that is unknown, of the wrong type, out of range, or in conflict with another."""


class MatchError(HybridNASError):
    """A parameter target that the free fields cannot reach."""


class GraphError(HybridNASError):
    """A layer graph that is not one chain from embedding to head of one width."""


class KernelUnavailableError(HybridNASError):
    """A requested implementation that this machine cannot run."""


class KernelInputError(HybridNASError):
    """Tensors whose rank, shape, dtype or device a kernel does not take."""


class NonFiniteInputError(KernelInputError):
    """A kernel's parameter that holds NaN or infinity, as weights do after a training that diverged."""


class DataError(HybridNASError):
    """A corpus, tokenizer or shard that cannot be used as asked."""


class CheckpointError(HybridNASError):
    """A checkpoint that is missing, truncated, or of another run."""


class TrainingError(HybridNASError):
    """A run that cannot go on: loss not finite, diverged, or impossible settings."""


class TrainingDiverged(TrainingError):  # noqa: N818
    """A loss, gradient or weight that is not finite, or a loss that stays far above a blind guess."""


class StudyError(HybridNASError):
    """A study folder, journal or trial that does not fit what was asked."""


class ExportError(HybridNASError):
    """A folder that is not an export, or an export whose logits do not agree."""


class LayoutError(HybridNASError):
    """A module imported under a second name, so that it would register twice."""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest allowed name, else ``"; allowed: a, b, c"``."""
    names = sorted(allowed)
    close = difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(names)}" if names else ""
