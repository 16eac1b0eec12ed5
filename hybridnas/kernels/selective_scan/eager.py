"""The selective scan in plain torch: chunk by chunk, with a hand-written backward that computes each chunk again.

Needs no compiler and runs on any device. Nothing of size (B, L, D, N) ever exists: the forward keeps one state per
chunk, the backward rebuilds a chunk's states from it. Inside a chunk everything but one ``addcmul`` per step is
vectorised. Shapes: B batch, L length, D channels, N state size, T steps of one chunk, time first inside a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, state_dtype
from hybridnas.kernels._register import differentiable_once
from hybridnas.kernels.selective_scan.reference import Inputs

CHUNK = 32  # steps; 16 is a little faster and keeps twice the checkpoints


class _Ready(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    keep: Tensor | None  # (B, L), 0 where the state restarts, else 1
    softplus: bool
    dtype: torch.dtype

    def time_first(self, tensor_BLX: Tensor, steps: slice) -> Tensor:
        """Return a chunk as (T, B, X) in the state's dtype, contiguous."""
        return tensor_BLX[:, steps].transpose(0, 1).to(self.dtype).contiguous()

    def raw_delta(self, steps: slice) -> Tensor:
        raw_TBD = self.time_first(self.delta, steps)
        return raw_TBD if self.bias is None else raw_TBD + self.bias.to(self.dtype)

    def decays(self, dt_TBD: Tensor, steps: slice, out_TBDN: Tensor) -> Tensor:
        a_TBDN = torch.mul(dt_TBD[..., None], self.A.to(self.dtype), out=out_TBDN).exp_()
        if self.keep is not None:
            a_TBDN.mul_(self.keep[:, steps].t()[..., None, None])
        return a_TBDN


def _states(a_TBDN: Tensor, x_TBD: Tensor, B_TBN: Tensor, h_BDN: Tensor, out_TBDN: Tensor) -> Tensor:
    """Fill ``out`` with the states h_1..h_T that follow ``h`` and return it."""
    torch.mul(x_TBD[..., None], B_TBN[:, :, None], out=out_TBDN)
    for a, h_next in zip(a_TBDN.unbind(0), out_TBDN.unbind(0), strict=True):
        h_BDN = h_next.addcmul_(a, h_BDN)
    return out_TBDN


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        u, delta, A, B, C, D, z, bias, initial, keep, softplus, save = args
        ins = _Ready(u, delta, A, B, C, D, z, bias, keep, softplus, state_dtype(u, delta, A, B, C))
        y_BLD, final_BDN, checkpoints = _forward(ins, initial, save)
        ctx.softplus, ctx.has_initial = softplus, None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, keep, torch.stack(checkpoints) if checkpoints else None)
        return y_BLD, final_BDN

    @staticmethod
    @differentiable_once("selective_scan")
    def backward(ctx: Any, dy_BLD: Tensor | None, dfinal_BDN: Tensor | None) -> tuple[Any, ...]:
        *saved, checkpoints = ctx.saved_tensors
        ins = _Ready._make([*saved, ctx.softplus, state_dtype(*saved[:5])])
        if dy_BLD is None:
            dy_BLD = torch.zeros_like(ins.u)
        grads = _Backward(ins, dy_BLD).run(checkpoints, dfinal_BDN)
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
        initial = None if ctx.has_initial is None else dinitial.to(ctx.has_initial)
        return du, ddelta, dA, dB, dC, dD, dz, dbias, initial, None, None, None


def _forward(ins: _Ready, initial: Tensor | None, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    (batch, length, channels), size = ins.u.shape, ins.A.shape[1]
    if initial is None:
        h_BDN = ins.u.new_zeros(batch, channels, size, dtype=ins.dtype)
    else:
        h_BDN = initial.to(ins.dtype, copy=True)
    y_BLD, checkpoints = torch.empty_like(ins.u, memory_format=torch.contiguous_format), []
    a_buffer = h_BDN.new_empty(min(CHUNK, length), batch, channels, size)
    h_buffer = torch.empty_like(a_buffer)
    for steps in _chunks(length):
        count = steps.stop - steps.start
        if save:
            checkpoints.append(h_BDN)
        raw_TBD, u_TBD = ins.raw_delta(steps), ins.time_first(ins.u, steps)
        dt_TBD = F.softplus(raw_TBD) if ins.softplus else raw_TBD
        a_TBDN = ins.decays(dt_TBD, steps, a_buffer[:count])
        h_TBDN = _states(a_TBDN, dt_TBD * u_TBD, ins.time_first(ins.B, steps), h_BDN, h_buffer[:count])
        h_BDN = h_TBDN[-1].clone()
        y_TBD = torch.matmul(h_TBDN, ins.time_first(ins.C, steps)[..., None]).squeeze(-1)
        if ins.D is not None:
            y_TBD.addcmul_(u_TBD, ins.D.to(ins.dtype))
        if ins.z is not None:
            y_TBD.mul_(F.silu(ins.time_first(ins.z, steps)))
        y_BLD[:, steps] = y_TBD.transpose(0, 1)
    return y_BLD, h_BDN, checkpoints


class _Backward:
    """Gradients of one call, accumulated from the last chunk to the first."""

    def __init__(self, ins: _Ready, dy_BLD: Tensor) -> None:
        def empty(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)

        self.ins, self.dy_BLD = ins, dy_BLD
        self.du, self.ddelta, self.dB, self.dC = empty(ins.u), empty(ins.delta), empty(ins.B), empty(ins.C)
        self.dz = None if ins.z is None else empty(ins.z)
        self.dA = ins.A.new_zeros(ins.A.shape, dtype=ins.dtype)
        self.dD = self.dA.new_zeros(ins.A.shape[0])
        self.dbias = torch.zeros_like(self.dD)

    def run(self, checkpoints: Tensor | None, dfinal_BDN: Tensor | None) -> tuple[Any, ...]:
        ins = self.ins
        (batch, length, channels), size = ins.u.shape, ins.A.shape[1]
        carry_BDN = ins.u.new_zeros(batch, channels, size, dtype=ins.dtype)
        if dfinal_BDN is not None:
            carry_BDN = carry_BDN + dfinal_BDN
        if checkpoints is not None:
            buffers = tuple(carry_BDN.new_empty(min(CHUNK, length) + 1, batch, channels, size) for _ in range(3))
            for steps, h_BDN in reversed(list(zip(_chunks(length), checkpoints.unbind(0), strict=True))):
                carry_BDN = self._chunk(steps, h_BDN, carry_BDN, buffers)
        dD = None if ins.D is None else self.dD.to(ins.D.dtype)
        dbias = None if ins.bias is None else self.dbias.to(ins.bias.dtype)
        return self.du, self.ddelta, self.dA.to(ins.A.dtype), self.dB, self.dC, dD, self.dz, dbias, carry_BDN

    def _gate(self, steps: slice, u_TBD: Tensor, h_TBDN: Tensor, C_TBN: Tensor) -> Tensor:
        """Return dy before the gate, and fill dz."""
        g_TBD = self.ins.time_first(self.dy_BLD, steps)
        if self.ins.z is None or self.dz is None:
            return g_TBD
        y_TBD = torch.matmul(h_TBDN, C_TBN[..., None]).squeeze(-1)
        if self.ins.D is not None:
            y_TBD.addcmul_(u_TBD, self.ins.D.to(self.ins.dtype))
        z_TBD = self.ins.time_first(self.ins.z, steps)
        sigmoid = torch.sigmoid(z_TBD)
        silu = z_TBD * sigmoid
        self.dz[:, steps] = (g_TBD * y_TBD * (sigmoid + silu * (1 - sigmoid))).transpose(0, 1)
        return g_TBD * silu

    def _chunk(self, steps: slice, h_BDN: Tensor, carry_BDN: Tensor, buffers: tuple[Tensor, ...]) -> Tensor:
        """Add one chunk's gradients; return the gradient with respect to the state before it."""
        ins, count = self.ins, steps.stop - steps.start
        a_TBDN, h_all, e_TBDN = buffers[0][:count], buffers[1][: count + 1], buffers[2][:count]
        raw_TBD, u_TBD = ins.raw_delta(steps), ins.time_first(ins.u, steps)
        B_TBN, C_TBN = ins.time_first(ins.B, steps), ins.time_first(ins.C, steps)
        dt_TBD = F.softplus(raw_TBD) if ins.softplus else raw_TBD
        x_TBD = dt_TBD * u_TBD
        ins.decays(dt_TBD, steps, a_TBDN)
        h_all[0] = h_BDN
        h_TBDN = _states(a_TBDN, x_TBD, B_TBN, h_all[0], h_all[1:])
        g_TBD = self._gate(steps, u_TBD, h_TBDN, C_TBN)
        # e_t = dLoss/dh_t, from the last step to the first
        torch.mul(g_TBD[..., None], C_TBN[:, :, None], out=e_TBDN)
        decays, es = a_TBDN.unbind(0), e_TBDN.unbind(0)
        es[-1].add_(carry_BDN)
        for t in range(count - 2, -1, -1):
            es[t].addcmul_(decays[t + 1], es[t + 1])
        carry_BDN = decays[0] * es[0]
        self.dC[:, steps] = torch.matmul(g_TBD.unsqueeze(2), h_TBDN).squeeze(2).transpose(0, 1)
        self.dB[:, steps] = torch.matmul(x_TBD.unsqueeze(2), e_TBDN).squeeze(2).transpose(0, 1)
        dx_TBD = torch.matmul(e_TBDN, B_TBN[..., None]).squeeze(-1)
        k_TBDN = a_TBDN.mul_(e_TBDN).mul_(h_all[:-1])  # dLoss/d(delta A)
        self.dA += torch.einsum("tbd,tbdn->dn", dt_TBD, k_TBDN)
        ddt_TBD = (k_TBDN * ins.A.to(ins.dtype)).sum(-1).addcmul_(dx_TBD, u_TBD)
        if ins.softplus:
            ddt_TBD.mul_(torch.sigmoid(raw_TBD))
        du_TBD = dx_TBD.mul_(dt_TBD)
        if ins.D is not None:
            du_TBD.addcmul_(g_TBD, ins.D.to(ins.dtype))
        self.dD += (g_TBD * u_TBD).sum((0, 1))
        self.dbias += ddt_TBD.sum((0, 1))
        self.du[:, steps] = du_TBD.transpose(0, 1)
        self.ddelta[:, steps] = ddt_TBD.transpose(0, 1)
        return carry_BDN


def scan_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype and the final state (B, D, N) in float32 (float64 for float64 inputs)."""
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.floating)
    keep = None if inputs.seq_idx is None else (~boundaries(inputs.seq_idx)).to(inputs.dtype)
    y_BLD, final_BDN = _ChunkedScan.apply(*inputs.floating, keep, inputs.delta_softplus, save)  # type: ignore[no-untyped-call]
    return y_BLD, final_BDN
