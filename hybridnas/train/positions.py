"""Loss by position in the context: how far back a model uses what it has read.

Texts are read chunk by chunk over the state, so a million tokens take the memory of one chunk and the state. Shapes: B
batch, L length, l tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from hybridnas.arch.long import prefill
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Source, check_vocab
from hybridnas.errors import DataError

CHUNK_TOKENS = 1 << 14  # of all sequences of a batch together


class PositionLoss(NamedTuple):
    """The loss of the places whose context has ``first`` to ``last`` tokens, the one read there included."""

    first: int
    last: int
    loss: float  # nats per token
    tokens: int  # places that counted


def loss_by_position(
    model: HybridLM,
    source: Source,
    *,
    n_tokens: int,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    part: str = "valid",
) -> list[PositionLoss]:
    """Return the mean loss of places 1, 2, 3-4, 5-8 ... of held-out windows of ``seq_len`` tokens.

    ``part``: valid or test. Raises DataError for data whose predictions come from one position alone, or without a
    place that counts, and ConfigError for a model that is not causal.
    """
    check_vocab(source.vocab_size, model.arch.vocab_size)
    bins = (seq_len - 1).bit_length() + 1
    nats_K, places_K = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64)
    bin_L = torch.tensor([place.bit_length() for place in range(seq_len)])  # of contexts 1 to seq_len
    batches = source.test_batches if part == "test" else source.valid_batches
    for batch in batches(n_tokens, batch_size, seq_len):
        if batch.head is not None:
            raise DataError(
                f"loss by position reads predictions from every place; this data takes them through {batch.head!r} "
                f"from one alone",
                field="data",
                got=batch.head,
            )
        if batch.segments_BL is not None:
            raise DataError(
                "loss by position reads each window as one stream; leave data.pack out",
                field="data.pack",
                got="documents",
            )
        size = max(1, CHUNK_TOKENS // len(batch.inputs_BL))
        start = 0
        for logits_BlV, _ in prefill(model, torch.split(batch.inputs_BL.to(device), size, dim=1)):
            stop = start + logits_BlV.shape[1]
            targets_Bl = batch.targets_BL[:, start:stop].to(device)
            loss_Bl = functional.cross_entropy(logits_BlV.float().transpose(1, 2), targets_Bl, reduction="none").cpu()
            counts_Bl = torch.ones_like(loss_Bl, dtype=torch.bool)
            if batch.mask_BL is not None:
                counts_Bl = batch.mask_BL[:, start:stop]
            where_Bl = bin_L[start:stop].expand_as(loss_Bl)[counts_Bl]
            nats_K += torch.bincount(where_Bl, weights=loss_Bl[counts_Bl].double(), minlength=bins)
            places_K += torch.bincount(where_Bl, minlength=bins)
            start = stop
    if not places_K.sum():
        raise DataError(f"{source.describe()}: no {part} tokens to measure", field="data")
    edges = [(1, 1), *((2**k + 1, min(2 ** (k + 1), seq_len)) for k in range(bins - 1))]
    return [
        PositionLoss(first, last, float(nats / count), int(count))
        for (first, last), nats, count in zip(edges, nats_K, places_K, strict=True)
        if count
    ]
