"""Token shift: each channel reads a mixture of its token and the one before (RWKV).

Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_before(x_BLD: Tensor, last_BD: Tensor | None, segments_BL: Tensor | None = None) -> Tensor:
    """Return what stands one token before each, (B, L, D): ``last_BD`` before the first, 0 where a document begins."""
    first_BD = torch.zeros_like(x_BLD[:, :1]) if last_BD is None else last_BD[:, None].to(x_BLD.dtype)
    before_BLD = torch.cat([first_BD, x_BLD], dim=1)[:, : x_BLD.shape[1]]
    if segments_BL is None:
        return before_BLD
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return before_BLD.masked_fill(begins_BL[..., None], 0.0)


def mixing_of(weight_D: Tensor, power: float) -> None:
    """Set the weights of the token before, 1 - (i / D) ** power for channel i, as RWKV-7 does in its middle layer."""
    with torch.no_grad():
        size = weight_D.shape[0]
        weight_D.copy_(1 - (torch.arange(size, dtype=torch.float32) / size).pow(power))
