"""Packed documents: several, one after another, in one row of a batch, none of which sees another.

``segments_BL`` (B, L) holds the number of each token's document, which does not fall along a row.
Shapes: B batch, L length, T keys, h pairs of turned channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.layers.rotary import rotation


def positions(segments_BL: Tensor) -> Tensor:
    """Return each token's place in its document, (B, L) from 0."""
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    changes_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    changes_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return place_L - torch.where(changes_BL, place_L, 0).cummax(dim=1).values


def rotation_by_document(
    segments_BL: Tensor, width: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, L, h) of positions that start again from 0 with each document."""
    cos_Lh, sin_Lh = rotation(0, segments_BL.shape[1], width, base, segments_BL.device, dtype)
    place_BL = positions(segments_BL)
    return cos_Lh[place_BL], sin_Lh[place_BL]


def same_document(query_BL: Tensor, key_BT: Tensor) -> Tensor:
    """Return (B, L, T) bool, true where a query and a key are of one document."""
    return query_BL[:, :, None] == key_BT[:, None, :]
