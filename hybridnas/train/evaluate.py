"""Cross-entropy and its measurement: nats per token, float32, auxiliary losses never mixed in.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch, Source
from hybridnas.errors import DataError
from hybridnas.kernels.cross_entropy import TokenScores
from hybridnas.layers.mode import evaluating
from hybridnas.study.documents import DocumentSums
from hybridnas.train.objective import Objective, check_causal, half_squares
from hybridnas.train.repeats import context_tokens, repeated

Autocast = Callable[[], AbstractContextManager[object]]


class Part(NamedTuple):
    """What one measurement finds of one part of the data."""

    loss: float  # nats per token
    accuracy: float  # share of places where the likeliest token is the right one; of numbers R2, the variance explained
    tokens: int  # places that counted
    correlation: float | None = None  # of numbers: Pearson's, between predicted and true ones; None: of ids


class Score(NamedTuple):
    """What one measurement finds: of data in parts, the mean of the parts, each counting the same."""

    loss: float  # nats per token
    bits_per_byte: float | None  # None where the data has no bytes
    accuracy: float
    tokens: int
    parts: Mapping[str, Part] = MappingProxyType({})  # by name, where the data has several
    documents: DocumentSums | None = None  # where they were asked for, of data in one part
    repeats: Part | None = None  # of text where documents were asked for: the places that say something again
    correlation: float | None = None  # of numbers, as in Part
    numbers: tuple[Tensor, Tensor] | None = None  # predicted and true ones, in the order of the examples

    def figures(self) -> dict[str, float]:
        """Return each part's loss and accuracy as ``loss.NAME`` and ``accuracy.NAME``."""
        kinds = ("loss", "accuracy")
        own = {} if self.correlation is None else {"correlation": self.correlation}
        return own | {f"{kind}.{name}": getattr(part, kind) for kind in kinds for name, part in self.parts.items()}

    def test_figures(self) -> dict[str, float]:
        """Return a measurement of the test part as ``Eval.aux`` holds it: ``test_loss``, ``test_accuracy`` ..."""
        own = {"loss": self.loss, "accuracy": self.accuracy, "bits_per_byte": self.bits_per_byte}
        if self.repeats is not None and self.repeats.tokens:
            own |= {"repeat_loss": self.repeats.loss, "repeat_accuracy": self.repeats.accuracy}
        return {f"test_{name}": value for name, value in {**own, **self.figures()}.items() if value is not None}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    if device.type == "cpu":
        return batch
    names = ("inputs_BL", "targets_BL", "mask_BL", "segments_BL", "values_BL")
    given = {name: tensor for name in names if (tensor := getattr(batch, name)) is not None}
    return batch._replace(**{name: tensor.to(device) for name, tensor in given.items()})


def counted(batch: Batch) -> Tensor | int:
    """Return how many places of a batch count."""
    return batch.targets_BL.numel() if batch.mask_BL is None else batch.mask_BL.sum()


def autocast(precision: str, device: torch.device) -> Autocast:
    """Return what wraps a forward pass: bfloat16 autocast where ``precision`` and ``device`` ask for it, else nothing.

    Weights stay float32: they are the master copy, and blocks keep SSM parameters and routers in float32 themselves.
    """
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if not wanted:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    *,
    n_tokens: int,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    precision: str = "auto",
    heads: nn.ModuleDict | None = None,
    allow_noncausal: bool = False,
    part: str = "valid",
    by_document: bool = False,
) -> Score:
    """Measure a model on the source's held-out batches, the same ones at every call; leaves the mode as it was.

    ``part``: ``valid``, by which candidates are chosen, or ``test``, for final figures. Bits per byte are the loss of
    all places over the bytes that they stand for: a separator adds to the loss and has none.

    ``by_document``: keep the sums of each document, too, for an interval over documents, and of text those of the
    places that say something again (:mod:`hybridnas.train.repeats`). Data in several parts has none, since their mean
    does not weigh places alike.

    ``model``: a HybridLM, or any module from ids (B, L) to logits (B, L, V). ``heads``: those of the source's tasks
    that were trained with it, where the source has any.

    Of data in several parts (``Source.valid_parts``) each is measured by itself, and the score is their mean: a part
    with few places counts as much as one with many. Raises DataError when a part has no validation tokens, ConfigError
    for a HybridLM with a layer that sees later tokens unless ``allow_noncausal``: its loss depends on the batch and is
    no language model's.
    """
    if isinstance(model, HybridLM):
        check_causal(model.arch, allow_noncausal)
    objective = Objective(model, heads, vocab_size=source.vocab_size)
    around = autocast(precision, device)
    held_out = (source.test_parts if part == "test" else source.valid_parts)(n_tokens, batch_size, seq_len)
    known = source.token_lengths
    lengths_V = None if known is None else torch.from_numpy(known)
    n_bytes = 0
    sums = _ByDocument() if by_document and len(held_out) == 1 else None
    wanted = sums is not None and source.unit is None  # what a genome or a recording repeats is no recall
    repeats = _Repeats(lengths_V) if wanted and lengths_V is not None else None
    with evaluating(objective):
        parts: dict[str, Part] = {}
        numbers: list[tuple[Tensor, Tensor]] = []
        for name, batches in held_out.items():
            parts[name], read = _measure(objective, batches, device, around, lengths_V, sums, repeats, numbers)
            n_bytes += read
    if not parts or any(one.tokens == 0 for one in parts.values()):
        raise DataError(f"{source.describe()}: no {part} tokens to measure; raise data.{part}_fraction or add text")
    loss = sum(one.loss for one in parts.values()) / len(parts)
    accuracy = sum(one.accuracy for one in parts.values()) / len(parts)
    tokens = sum(one.tokens for one in parts.values())
    bits = loss * tokens / math.log(2) / n_bytes if n_bytes else None
    documents = None if sums is None else sums.found()
    again = None if repeats is None else repeats.found()
    named = {name: one for name, one in parts.items() if name}
    both = (torch.cat([one for one, _ in numbers]), torch.cat([one for _, one in numbers])) if numbers else None
    correlation = next(iter(parts.values())).correlation
    return Score(loss, bits, accuracy, tokens, named, documents, again, correlation, both)


def _measure(
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    around: Autocast,
    lengths_V: Tensor | None,
    sums: _ByDocument | None,
    repeats: _Repeats | None,
    numbers: list[tuple[Tensor, Tensor]],
) -> tuple[Part, int]:
    """Return what was found of one part, and the bytes that its places stand for, 0 where bytes mean nothing."""
    total, right, places, n_bytes = 0.0, 0, 0, 0
    for raw in batches:
        batch = to_device(raw, device)
        lengths_BL = None
        if lengths_V is not None:
            lengths_BL = lengths_V[raw.targets_BL]
            n_bytes += int(lengths_BL.sum() if raw.mask_BL is None else lengths_BL[raw.mask_BL].sum())
        with around():
            scores = objective.scores(batch) if raw.values_BL is None else _numbers(objective, batch, raw, numbers)
        total += float(scores.loss.sum())
        right += int(scores.correct.sum())
        places += int(counted(batch))
        if sums is not None:
            sums.add(raw, scores.loss, lengths_BL)
        if repeats is not None:
            repeats.add(raw, scores)
    if numbers:
        predicted, true = (torch.cat([pair[side] for pair in numbers]).double() for side in (0, 1))
        return Part(total / max(1, places), explained(predicted, true), places, correlation(predicted, true)), n_bytes
    return Part(total / max(1, places), right / max(1, places), places), n_bytes


def _numbers(objective: Objective, batch: Batch, raw: Batch, numbers: list[tuple[Tensor, Tensor]]) -> TokenScores:
    """Return the losses of a batch of numbers, and keep what was predicted beside what is true."""
    predicted_BL = objective.numbers(batch)
    assert raw.values_BL is not None
    numbers.append((predicted_BL.cpu()[raw.mask_BL], raw.values_BL[raw.mask_BL]))
    loss_BL = half_squares(predicted_BL, batch)
    return TokenScores(loss_BL, torch.zeros_like(loss_BL), torch.zeros_like(loss_BL, dtype=torch.bool))


def explained(predicted_N: Tensor, true_N: Tensor) -> float:
    """Return R2, one less the squared error over the variance; 0 where the true numbers are all the same."""
    variance = float((true_N - true_N.mean()).square().sum())
    return 1 - float((predicted_N - true_N).square().sum()) / variance if variance else 0.0


def correlation(predicted_N: Tensor, true_N: Tensor) -> float:
    """Return Pearson's correlation; 0 where either side is constant."""
    one_N, other_N = predicted_N - predicted_N.mean(), true_N - true_N.mean()
    scale = float((one_N.square().sum() * other_N.square().sum()).sqrt())
    return float((one_N * other_N).sum()) / scale if scale else 0.0


class _ByDocument:
    """Sums of losses, places and bytes by document, batch after batch."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, int, int]] = {}
        self._rows = 0

    def add(self, batch: Batch, loss_BL: Tensor, lengths_BL: Tensor | None) -> None:
        """Add a batch, the loss of each place (0 where it does not count) and the bytes that its target stands for."""
        mask_BL = torch.ones_like(batch.targets_BL, dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL
        documents_BL = batch.documents_BL
        if documents_BL is None:  # examples of a task are drawn one by one
            rows = len(mask_BL)
            documents_BL = torch.arange(self._rows, self._rows + rows)[:, None].expand_as(mask_BL)
            self._rows += rows
        found, index = torch.unique(documents_BL[mask_BL], return_inverse=True)
        count = len(found)
        columns = (
            torch.bincount(index, weights=loss_BL.cpu().double()[mask_BL], minlength=count),
            torch.bincount(index, minlength=count),
            torch.zeros(count) if lengths_BL is None else torch.bincount(index, lengths_BL[mask_BL], minlength=count),
        )
        for number, *values in zip(found.tolist(), *(column.tolist() for column in columns), strict=True):
            nats, tokens, n_bytes = self._sums.get(number, (0.0, 0, 0))
            self._sums[number] = (nats + values[0], tokens + int(values[1]), n_bytes + int(values[2]))

    def found(self) -> DocumentSums:
        """Return the sums, by number of the document."""
        known = sorted(self._sums.items())
        nats, tokens, n_bytes = zip(*(sums for _, sums in known), strict=True) if known else ((), (), ())
        return DocumentSums(tuple(number for number, _ in known), nats, tokens, n_bytes)


class _Repeats:
    """Sums over the places that say again what their row has said before."""

    def __init__(self, lengths_V: Tensor) -> None:
        self._lengths_V = lengths_V
        self._context: int | None = None
        self._loss, self._right, self._places = 0.0, 0, 0

    def add(self, batch: Batch, scores: TokenScores) -> None:
        """Add a batch and what was found of its places."""
        if self._context is None:  # by the first batch, which is the same at every call
            lengths = self._lengths_V[batch.targets_BL].double()
            self._context = context_tokens(float(lengths.sum() / max(1, int((lengths > 0).sum()))))
        again_BL = repeated(batch.inputs_BL, batch.targets_BL, self._context, batch.segments_BL)
        if batch.mask_BL is not None:
            again_BL &= batch.mask_BL
        again_BL = again_BL.to(scores.loss.device)
        self._loss += float(scores.loss[again_BL].sum())
        self._right += int(scores.correct[again_BL].sum())
        self._places += int(again_BL.sum())

    def found(self) -> Part:
        """Return the means over these places."""
        count = max(1, self._places)
        return Part(self._loss / count, self._right / count, self._places)


def mean_stats(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average a forward pass's statistics over layers: ``layer03.E.dropped`` of all layers becomes ``dropped``.

    ``load_E``, the share of tokens per expert, becomes ``max_load``: the busiest expert in units of a fair share.
    """
    grouped: dict[str, list[Tensor]] = {}
    for name, value in stats.items():
        key = name.rpartition(".")[2]
        if key == "load_E":
            key, value = "max_load", value.max() * value.numel()
        if value.ndim == 0:
            grouped.setdefault(key, []).append(value.detach().float())
    return {key: torch.stack(values).mean() for key, values in grouped.items()}
