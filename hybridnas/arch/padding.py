"""Batches whose rows have different lengths: what a row gives is what it gives alone, for every block.

No block knows of padding. Without a state, the real tokens of a batch are moved together into rows that end with what
no earlier token sees, in one pass. With a state, rows are read in groups that have the same number of tokens to read,
and groups whose states have one shape go on together: all of a recurrent model, those of one length under attention.

Shapes: B batch, L length, R rows of a group, l tokens that a group reads, S sequences, D d_model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridnas.layers.block import Aux, State, map_state

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM, LMState


class RowStates:
    """The states of the rows of a batch that may have read different numbers of tokens.

    ``groups``: (rows (R,), their state) of rows that are computed together; every row is in one group.
    """

    def __init__(self, model: HybridLM, batch_size: int) -> None:
        rows_B = torch.arange(batch_size, device=model.embedding.weight.device)
        self.groups: list[tuple[Tensor, LMState]] = [(rows_B, model.init_state(batch_size))]

    def read(self, model: HybridLM, ids_BL: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return what the head reads (B, L, D) at the real tokens of every row, 0 elsewhere, and go on from there.

        ``real_BL``: bool, True at tokens that are read; None reads all.
        """
        if len(self.groups) == 1 and (real_BL is None or bool(real_BL.all())):
            rows_B, state = self.groups[0]  # one group has the rows in their order, see select
            x_BLD, following, _ = model.hidden(ids_BL, state)
            assert following is not None
            self.groups = [(rows_B, following)]
            return x_BLD
        if real_BL is None:
            real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        groups: list[tuple[Tensor, LMState]] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows_R, state in self.groups:
            for count, part_R in _by_count(real_BL[rows_R].sum(dim=1)):
                rows, own = rows_R[part_R], tuple(_rows_of(s, part_R) for s in state)
                if count:
                    real_RL = real_BL[rows]
                    x_RlD, following, _ = model.hidden(ids_BL[rows][real_RL].view(-1, count), own)
                    assert following is not None
                    own = following
                    found.append((rows[:, None], real_RL.nonzero()[:, 1].view(-1, count), x_RlD))
                groups.append((rows, own))
        self.groups = list(_merged(groups))
        x_BLD = (found[0][2] if found else model.embedding.weight).new_zeros(*ids_BL.shape, model.arch.d_model)
        for rows_R1, columns_Rl, x_RlD in found:
            x_BLD[rows_R1, columns_Rl] = x_RlD
        return x_BLD

    def select(self, indices_B: Tensor) -> None:
        """Make row i what row ``indices_B[i]`` was: beams in a new order, rows repeated or left out."""
        groups: list[tuple[Tensor, LMState]] = []
        for rows_R, state in self.groups:
            new_N, place_N = (indices_B[:, None] == rows_R).nonzero(as_tuple=True)
            if len(new_N):
                groups.append((new_N, tuple(_rows_of(s, place_N) for s in state)))
        self.groups = groups  # of one group new_N counts up from 0, so its rows are in their order


def hidden_of_rows(model: HybridLM, ids_BL: Tensor, document_BL: Tensor) -> tuple[Tensor, Aux]:
    """Return what the head reads (B, L, D), 0 at padding, and auxiliary losses and statistics; there is no state.

    ``document_BL``: int64, 0 at padding and else the number of the document in its row, rising from 1: neither padding
    nor another document is seen. Where experts have a capacity or a balance, tokens behind a row's end count in them.
    A model with a block that is not causal reads the documents in groups of one length.
    """
    row_T, column_T = document_BL.nonzero(as_tuple=True)
    first_T = torch.ones_like(row_T, dtype=torch.bool)
    key_T = row_T * (int(document_BL.max()) + 1) + document_BL[row_T, column_T]
    first_T[1:] = key_T[1:] != key_T[:-1]
    sequence_T = first_T.cumsum(0) - 1
    starts_S = first_T.nonzero()[:, 0]
    place_T = torch.arange(len(row_T), device=row_T.device) - starts_S[sequence_T]
    length_S = torch.bincount(sequence_T)
    ids_Sl = ids_BL.new_zeros(len(length_S), int(length_S.max()))
    ids_Sl[sequence_T, place_T] = ids_BL[row_T, column_T]
    x_SlD, aux = _sequences(model, ids_Sl, length_S)
    x_BLD = x_SlD.new_zeros(*ids_BL.shape, x_SlD.shape[2])
    x_BLD[row_T, column_T] = x_SlD[sequence_T, place_T]
    return x_BLD, aux


def _sequences(model: HybridLM, ids_Sl: Tensor, length_S: Tensor) -> tuple[Tensor, Aux]:
    if all(node.config.causal for node in model.arch.nodes):
        x_SlD, _, aux = model.hidden(ids_Sl)
        return x_SlD, aux
    x_SlD = model.embedding.weight.new_zeros(*ids_Sl.shape, model.arch.d_model)
    losses: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    for length, part_R in _by_count(length_S):
        x_RlD, _, aux = model.hidden(ids_Sl[part_R, :length])
        x_SlD[part_R, :length] = x_RlD.to(x_SlD.dtype)
        share = len(part_R) / len(length_S)
        for sums, own in ((losses, aux.losses), (stats, aux.stats)):
            for name, value in own.items():
                sums[name] = sums.get(name, 0) + (value * share if value.is_floating_point() else value)
    return x_SlD, Aux(losses, stats)


def _by_count(count_R: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each number that occurs, and the places where it does."""
    for count in sorted(set(count_R.tolist())):
        yield int(count), (count_R == count).nonzero()[:, 0]


def _rows_of(state: State, part_R: Tensor) -> State:
    return map_state(lambda tensor: tensor.index_select(0, part_R), state)


def _merged(groups: list[tuple[Tensor, LMState]]) -> Iterator[tuple[Tensor, LMState]]:
    """Yield the groups, those joined whose states have the same shapes; if that leaves one, its rows in order."""
    alike: dict[object, list[tuple[Tensor, LMState]]] = defaultdict(list)
    for rows_R, state in groups:
        alike[tuple((tensor.shape[1:], tensor.dtype) for s in state for tensor in s)].append((rows_R, state))
    for same in alike.values():
        rows_R = torch.cat([rows for rows, _ in same])
        state = same[0][1]
        if len(same) > 1:
            parts = zip(*(state for _, state in same), strict=True)
            state = tuple(map_state(lambda *tensors: torch.cat(tensors), *own) for own in parts)
        order_R = rows_R.argsort()
        if not bool((order_R[1:] > order_R[:-1]).all()):
            rows_R, state = rows_R[order_R], tuple(_rows_of(s, order_R) for s in state)
        yield rows_R, state
