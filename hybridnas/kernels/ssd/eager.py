"""State-space duality in matrix products: quadratic inside a chunk, one state from chunk to chunk.

Shapes: B batch, L length, H heads, P channels of a head, G groups, R heads of a group, N state size, K chunks, T steps
of a chunk. Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels.ssd.reference import Inputs, finish, ssd_reference, steps_of


def ssd_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in float32, differentiable by autograd."""
    if inputs.x.shape[1] <= 1:  # one step is the recurrence itself
        return ssd_reference(inputs)
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, chunk_size = inputs
    dtype, (batch, length, heads, width) = inputs.dtype, x.shape
    groups, size = B.shape[2:]
    steps = min(chunk_size, length)
    missing = -length % steps
    chunks = (length + missing) // steps
    dt_BLH = steps_of(dt, dt_bias, dt_softplus, dtype)
    # a step of size zero decays nothing and adds nothing: padding changes neither outputs nor the state
    log_BKGRT = _chunks(dt_BLH * A.to(dtype), steps, missing).reshape(batch, chunks, steps, groups, heads // groups)
    log_BKGRT = log_BKGRT.permute(0, 1, 3, 4, 2)
    u_BKGRTP = _chunks(dt_BLH[..., None] * x.to(dtype), steps, missing)
    u_BKGRTP = u_BKGRTP.reshape(batch, chunks, steps, groups, heads // groups, width).permute(0, 1, 3, 4, 2, 5)
    B_BKGTN = _chunks(B.to(dtype), steps, missing).transpose(2, 3)
    C_BKGTN = _chunks(C.to(dtype), steps, missing).transpose(2, 3)
    within, from_start, to_end, through = _decays(log_BKGRT, seq_idx, steps, missing)
    scores_BKGTT = C_BKGTN @ B_BKGTN.transpose(-1, -2)
    y_BKGRTP = (scores_BKGTT.unsqueeze(3) * within) @ u_BKGRTP
    added_BKGRPN = (u_BKGRTP * to_end[..., None]).transpose(-1, -2) @ B_BKGTN.unsqueeze(3)
    if initial_state is None:
        h_BGRPN = torch.zeros(batch, groups, heads // groups, width, size, dtype=dtype, device=x.device)
    else:
        h_BGRPN = initial_state.to(dtype).reshape(batch, groups, heads // groups, width, size)
    before = []
    for keep_BGR, added_BGRPN in zip(through.unbind(1), added_BKGRPN.unbind(1), strict=True):
        before.append(h_BGRPN)
        h_BGRPN = torch.addcmul(added_BGRPN, keep_BGR[..., None, None], h_BGRPN)
    carried_BKGRTP = C_BKGTN.unsqueeze(3) @ torch.stack(before, 1).transpose(-1, -2)
    y_BKGRTP = torch.addcmul(y_BKGRTP, carried_BKGRTP, from_start[..., None])
    y_BLHP = y_BKGRTP.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * steps, heads, width)[:, :length]
    return finish(y_BLHP, x, D, z), h_BGRPN.reshape(batch, heads, width, size)


def _chunks(tensor_BLX: Tensor, steps: int, missing: int) -> Tensor:
    """Return (B, K, T, ...) with zeros for what the last chunk lacks."""
    if missing:
        tensor_BLX = F.pad(tensor_BLX, (0, 0) * (tensor_BLX.dim() - 2) + (0, missing))
    return tensor_BLX.reshape(tensor_BLX.shape[0], tensor_BLX.shape[1] // steps, steps, *tensor_BLX.shape[2:])


def _decays(
    log_BKGRT: Tensor, seq_idx: Tensor | None, steps: int, missing: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is left of step j at step i, of the start at i, of i at the end, of the start at the end.

    ``log`` holds the logarithm of each step's decay. Sums run over the steps between j and i alone: differences of
    one running sum would lose the digits that the gradient of A needs. Masked with -inf before exp, never after, so
    that neither the value nor the gradient can become inf * 0.
    """
    nothing = float("-inf")
    future_TT = torch.ones(steps, steps, dtype=torch.bool, device=log_BKGRT.device).triu()
    within = log_BKGRT[..., :, None].expand(*log_BKGRT.shape, steps).masked_fill(future_TT, 0.0).cumsum(-2)
    from_start, to_end = log_BKGRT.cumsum(-1), within[..., -1, :]
    through = from_start[..., -1:]
    within = within.masked_fill(future_TT.triu(1), nothing)
    if seq_idx is not None:
        number_BL = boundaries(seq_idx).long().cumsum(1)
        number_BL = torch.cat([number_BL, number_BL[:, -1:].expand(-1, missing)], 1)
        number_BKT = number_BL.reshape(number_BL.shape[0], number_BL.shape[1] // steps, steps)
        before_BK1 = F.pad(number_BKT[:, :-1, -1:], (0, 0, 1, 0))  # the document that the chunk's first state is of
        within = within.masked_fill((number_BKT[..., :, None] != number_BKT[..., None, :])[:, :, None, None], nothing)
        end_BK1 = number_BKT[..., -1:]
        from_start = from_start.masked_fill((number_BKT != before_BK1)[:, :, None, None], nothing)
        to_end = to_end.masked_fill((number_BKT != end_BK1)[:, :, None, None], nothing)
        through = through.masked_fill((end_BK1 != before_BK1)[:, :, None, None], nothing)
    return within.exp(), from_start.exp(), to_end.exp(), through.exp().squeeze(-1)
