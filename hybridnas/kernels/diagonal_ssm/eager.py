"""A diagonal, time-invariant state space as a convolution, by FFT, from any state, and one step for one token.

The filter K_l = Re(sum over N of weight decay^l), the state's share of the outputs and the state after the last step
all need decay^l for l up to L. These are products of two tables of about sqrt(L) powers, l = T i + j, so that nothing
of size (D, N, L) exists. Shapes: B batch, L length, D channels, N states, I tiles of T steps, I T >= L.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels.diagonal_scan import diagonal_scan
from hybridnas.kernels.diagonal_ssm.reference import Inputs, real_part

_DIRECT = 64  # steps up to which the filter's matrix takes the place of the FFT
_DOCUMENT_STEPS = 64  # whose states exist at once where documents begin inside a row


def ssm_eager(inputs: Inputs, *, with_state: bool) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype and the final state (B, D, N), differentiable by plain autograd.

    Without ``with_state`` the second is the first state where the last one would have to be computed for itself.
    """
    u, log_decay, weight, initial_state, seq_idx = inputs
    if not u.numel():
        return inputs.nothing, inputs.first
    log_DN, weight_DN, u_BLD = log_decay.to(inputs.dtype), weight.to(inputs.dtype), u.to(inputs.real_dtype)
    if seq_idx is not None:
        return _documents(inputs, log_DN, weight_DN, u_BLD)
    if u.shape[1] == 1:
        h_BDN = torch.addcmul(u_BLD[:, 0, :, None].to(inputs.dtype), log_DN.exp(), inputs.first)
        return real_part((weight_DN * h_BDN).sum(-1))[:, None].to(u.dtype), h_BDN
    tiles_DNI, steps_DNT = _powers(log_DN, u.shape[1])
    u_BDL = u_BLD.transpose(1, 2).contiguous()
    y_BDL = _convolved(u_BDL, _filter(weight_DN, tiles_DNI, steps_DNT)[:, : u.shape[1]])
    if initial_state is not None:
        y_BDL = y_BDL + _from_state(weight_DN * log_DN.exp() * inputs.first, tiles_DNI, steps_DNT)[..., : u.shape[1]]
    y_BLD = y_BDL.transpose(1, 2).to(u.dtype)
    if not with_state:
        return y_BLD, inputs.first
    h_BDN = _last_state(u_BDL, tiles_DNI, steps_DNT)
    if initial_state is not None:
        h_BDN = torch.addcmul(h_BDN, (log_DN * u.shape[1]).exp(), inputs.first)
    return y_BLD, h_BDN


def _powers(log_DN: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return decay^(T i), (D, N, I), and decay^j, (D, N, T), with I T >= length and both about its root."""
    steps = math.isqrt(length - 1) + 1
    tiles = -(-length // steps)
    counts = torch.arange(max(steps, tiles), device=log_DN.device)
    return (log_DN[..., None] * (steps * counts[:tiles])).exp(), (log_DN[..., None] * counts[:steps]).exp()


def _filter(weight_DN: Tensor, tiles_DNI: Tensor, steps_DNT: Tensor) -> Tensor:
    """Return Re(sum over N of weight decay^l), (D, I T)."""
    left_DNI = weight_DN[..., None] * tiles_DNI
    if not left_DNI.is_complex():
        return (left_DNI.mT @ steps_DNT).flatten(1)
    left, right = torch.cat([left_DNI.real, -left_DNI.imag], 1), torch.cat([steps_DNT.real, steps_DNT.imag], 1)
    return (left.mT @ right).flatten(1)


def _from_state(h_BDN: Tensor, tiles_DNI: Tensor, steps_DNT: Tensor) -> Tensor:
    """Return Re(sum over N of h decay^l), (B, D, I T)."""
    left_BDNI = h_BDN[..., None] * tiles_DNI
    return real_part(torch.matmul(left_BDNI.mT, steps_DNT)).flatten(2)


def _last_state(u_BDL: Tensor, tiles_DNI: Tensor, steps_DNT: Tensor) -> Tensor:
    """Return sum over l of decay^l u_{L-1-l}, (B, D, N)."""
    tiles, steps = tiles_DNI.shape[-1], steps_DNT.shape[-1]
    back_BDL = F.pad(u_BDL.flip(-1), (0, tiles * steps - u_BDL.shape[-1]))
    back_BDTI = torch.unflatten(back_BDL, -1, (tiles, steps)).mT.to(steps_DNT.dtype)
    return (torch.matmul(steps_DNT, back_BDTI) * tiles_DNI).sum(-1)


def _convolved(u_BDL: Tensor, filter_DL: Tensor) -> Tensor:
    """Return the causal convolution of each channel with its filter, (B, D, L).

    A short sequence is multiplied by the filter's matrix. An FFT rounds in proportion to the largest number of the row:
    in float32 a large input reaches earlier outputs by about 1e-7 of it.
    """
    length = u_BDL.shape[-1]
    if length <= _DIRECT:
        place_L = torch.arange(length, device=u_BDL.device)
        back_LL = place_L[:, None] - place_L
        matrix_DLL = filter_DL[:, back_LL.clamp_min(0)].masked_fill(back_LL < 0, 0.0)
        return torch.matmul(matrix_DLL, u_BDL.permute(1, 2, 0)).permute(2, 0, 1)
    size = _fft_length(2 * length - 1)
    spectrum_BDX = torch.fft.rfft(u_BDL, n=size) * torch.fft.rfft(filter_DL, n=size)
    y_BDX: Tensor = torch.fft.irfft(spectrum_BDX, n=size)
    return y_BDX[..., :length]


def _fft_length(length: int) -> int:
    """Return a length of at least this that is 8 to 16 times a power of two, which an FFT takes fast."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def _documents(inputs: Inputs, log_DN: Tensor, weight_DN: Tensor, u_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and state by the recurrence, which can restart, some steps at a time."""
    assert inputs.seq_idx is not None
    begins_BL = boundaries(inputs.seq_idx).long()
    batch, length, channels = u_BLD.shape
    size = log_DN.shape[1]
    decay_X, h_BX, outputs = log_DN.exp().flatten(), inputs.first.flatten(1), []
    for start in range(0, length, _DOCUMENT_STEPS):
        u_BTD = u_BLD[:, start : start + _DOCUMENT_STEPS]
        ids_BT = begins_BL[:, start : start + _DOCUMENT_STEPS].cumsum(1)
        steps = u_BTD.shape[1]
        x_BTX = u_BTD[..., None].expand(-1, -1, -1, size).flatten(2).to(inputs.dtype)
        h_BX = torch.where(begins_BL[:, start, None] > 0, torch.zeros_like(h_BX), h_BX)
        found = diagonal_scan(decay_X.expand(batch, steps, -1), x_BTX, h_BX, return_final_state=True, seq_idx=ids_BT)
        h_BTX, h_BX = found
        outputs.append(real_part((torch.unflatten(h_BTX, -1, (channels, size)) * weight_DN).sum(-1)))
    return torch.cat(outputs, 1).to(inputs.u.dtype), torch.unflatten(h_BX, -1, (channels, size))
