"""Long texts through a model, chunk by chunk: only the state goes from one chunk to the next.

Shapes: B batch, l tokens of one chunk, L of all chunks, D d_model, V vocabulary, P asked positions.

What is held at a time is one chunk's activations and the state. The state of recurrent blocks (M, N) has one size; that
of attention (A) holds keys and values of everything read and grows with L by nature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hybridnas.arch.model import HybridLM, LMState
from hybridnas.errors import ConfigError
from hybridnas.layers.block import State, map_state
from hybridnas.layers.mode import evaluating


def prefill(
    model: HybridLM, chunks: Iterable[Tensor], *, state: LMState | None = None
) -> Iterator[tuple[Tensor, LMState]]:
    """Yield (logits (B, l, V), state after the chunk) for each chunk of ids (B, l) int64, without gradients.

    ``state``: where to go on from; None starts fresh. The model evaluates (no dropped tokens in experts) while it
    reads and is left in the mode it was in. Memory is that of one chunk as long as the caller keeps no logits, plus
    the state, which grows with the text for attention alone. Raises ConfigError for a chunk that is no (B, l) with
    l >= 1, and for a model with a block that is not causal.
    """
    for chunk_Bl in chunks:
        x_BlD, state = _read(model, chunk_Bl, state)
        yield _head(model, x_BlD), state
        del x_BlD  # while the next chunk is read


def last_logits(
    model: HybridLM,
    ids_or_chunks: Tensor | Iterable[Tensor],
    *,
    chunk_tokens: int = 4096,
    positions: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the logits (B, V) after the last token, or (B, P, V) after the tokens at ``positions``, in their order.

    ids (B, L) int64, read ``chunk_tokens`` at a time, or an iterable of such pieces, for a text that need not exist
    in memory at once. The head runs on the asked positions only, and nothing after the largest of them is read.
    Memory as in ``prefill``. Raises ConfigError for no token, ``chunk_tokens`` below 1, no positions, and positions
    that are negative or not in the text.
    """
    if chunk_tokens < 1:
        raise ConfigError(
            f"last_logits chunk_tokens must be at least 1, got {chunk_tokens}",
            field="chunk_tokens",
            got=chunk_tokens,
            allowed=">= 1",
        )
    wanted = None if positions is None else torch.as_tensor(positions, dtype=torch.int64).flatten()
    if wanted is not None and (wanted.numel() == 0 or bool((wanted < 0).any())):
        raise ConfigError(
            f"last_logits positions must be at least one index from 0 up, got {wanted.tolist()}",
            field="positions",
            got=wanted.tolist(),
            allowed=">= 0",
        )
    pieces = [ids_or_chunks] if isinstance(ids_or_chunks, Tensor) else ids_or_chunks
    chunks = (chunk for piece in pieces for chunk in _split(piece, chunk_tokens))
    read, state, last_BD, found_BPD = 0, None, None, None
    for chunk_Bl in chunks:
        x_BlD, following = _read(model, chunk_Bl, state)
        state = _kept(state, following)
        start, read = read, read + x_BlD.shape[1]
        last_BD = x_BlD[:, -1].clone()
        if wanted is not None:
            if found_BPD is None:
                found_BPD = x_BlD.new_empty(x_BlD.shape[0], wanted.numel(), x_BlD.shape[2])
            here = (wanted >= start) & (wanted < read)
            found_BPD[:, here] = x_BlD[:, (wanted[here] - start).to(x_BlD.device)]
            if read > int(wanted.max()):
                break
        del x_BlD, following
    if last_BD is None:
        raise ConfigError("last_logits needs at least one token to read, got none", field="ids_or_chunks", got=0)
    if wanted is not None and read <= int(wanted.max()):
        raise ConfigError(
            f"last_logits position {int(wanted.max())} is beyond the text of {read} tokens; use 0 to {read - 1}",
            field="positions",
            got=int(wanted.max()),
            allowed=f"0 to {read - 1}",
        )
    return _head(model, last_BD if found_BPD is None else found_BPD)


def _kept(state: LMState | None, following: LMState) -> LMState:
    """Return the next state in the memory of the last one where it has the same size.

    A million tokens are hundreds of chunks: states that move through the heap would keep it from being used again.
    """
    if state is None:  # tensors of our own: a block may return views, of its input or of one row for the whole batch
        return tuple(map_state(lambda new: new.clone(memory_format=torch.contiguous_format), s) for s in following)
    return tuple(_overwritten(new, old) for new, old in zip(following, state, strict=True))


def _overwritten(new: State, old: State) -> State:
    """Copy a state into the tensors of the last one, unless it is made of them (a block that shifts its tensors)."""
    held = {tensor.untyped_storage().data_ptr() for tensor in old}
    if any(tensor.untyped_storage().data_ptr() in held for tensor in new):
        return new
    return map_state(lambda a, b: b.copy_(a) if a.shape == b.shape and a.dtype == b.dtype else a, new, old)


def _split(ids_BL: Tensor, size: int) -> Sequence[Tensor]:
    """Return pieces of at most ``size`` tokens; ids of a wrong shape go on as they are, to be refused by name."""
    return torch.split(ids_BL, size, dim=1) if ids_BL.ndim == 2 else [ids_BL]


def _read(model: HybridLM, chunk_Bl: Tensor, state: LMState | None) -> tuple[Tensor, LMState]:
    """Return what the head reads, and the state after a chunk."""
    if chunk_Bl.ndim != 2 or chunk_Bl.shape[1] == 0:
        raise ConfigError(
            f"a chunk of ids must be (batch, at least one token), got shape {tuple(chunk_Bl.shape)}",
            field="ids",
            got=tuple(chunk_Bl.shape),
            allowed="(B, L) with L >= 1",
        )
    with evaluating(model), torch.no_grad():
        x_BlD, following, _ = model.hidden(chunk_Bl, model.init_state(chunk_Bl.shape[0]) if state is None else state)
    assert following is not None
    return x_BlD, following


@torch.no_grad()
def _head(model: HybridLM, x: Tensor) -> Tensor:
    logits: Tensor = model.head(x)
    return logits
