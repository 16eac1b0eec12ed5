"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): one latent vector per token instead of keys.

    q = q_up(norm(down_q(x))), or down_q(x) without a query rank     per head: P channels, then R that turn
    c, r = norm(down_c(x)), turned(down_r(x))                        what the cache holds, one for all heads
    k, v = kv_up(c), with r beside each head's k                     per head: P + R channels, V channels

A few queries over a long cache read the latents as they are, with ``kv_up`` applied to queries and results instead of
to all keys and values: the same function with other products.

Shapes: B batch, L length, T cached positions, D d_model, H heads, P channels without position, R rotary channels, V
channels of a value, C latent rank, Q query rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybridnas.hardware import Impl
from hybridnas.layers.block import exportable, truncated_normal_
from hybridnas.layers.norms import RMSNorm, one_row
from hybridnas.layers.rotary import Angles, rotate, rotation
from hybridnas.layers.segments import rotation_by_document
from hybridnas.layers.softmax_attention import softmax_attention

_Norm = Callable[[Tensor], Tensor]


@exportable
class LatentState(NamedTuple):
    """Normed latents of all positions read so far, and beside them the shared rotary keys, turned already."""

    latent_BTN: Tensor  # N = C + R


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Sizes of latent attention, all defaults resolved [channels]."""

    d_model: int
    heads: int
    head: int  # P
    rotary: int  # R
    value: int  # V
    kv_rank: int  # C
    q_rank: int | None  # Q
    bias: bool
    norm_eps: float
    rope_base: float | None  # None: the R channels stay unturned (Kimi Linear)

    @property
    def query(self) -> int:
        """Channels of the queries of all heads."""
        return self.heads * (self.head + self.rotary)

    @property
    def down(self) -> int:
        """Rows of the first matrix: queries or their latent, the latent of keys and values, the rotary keys."""
        return (self.q_rank or self.query) + self.kv_rank + self.rotary

    @property
    def matrices(self) -> int:
        """Weights of the matrices that every token is multiplied by [count]."""
        up = self.kv_rank * self.heads * (self.head + self.value)
        return self.d_model * self.down + up + (self.q_rank or 0) * self.query

    @property
    def params(self) -> int:
        """All weights [count]."""
        return self.matrices + self.kv_rank + (self.q_rank or 0) + (self.down if self.bias else 0)


class LatentAttention(nn.Module):
    """Results (B, H, L, V) of all heads, before a gate and the projection to d_model."""

    def __init__(self, shape: LatentShape, *, scale: float | None, softcap: float | None, impl: Impl) -> None:
        super().__init__()
        self.shape, self.scale, self.softcap, self.impl = shape, scale, softcap, impl
        self.down_proj = nn.Linear(shape.d_model, shape.down, bias=shape.bias)
        self.q_norm: RMSNorm | None = None
        self.q_up_proj: nn.Linear | None = None
        if shape.q_rank is not None:
            self.q_norm = RMSNorm(shape.q_rank, shape.norm_eps, impl=impl)
            self.q_up_proj = nn.Linear(shape.q_rank, shape.query, bias=False)
        self.kv_norm = RMSNorm(shape.kv_rank, shape.norm_eps, impl=impl)
        self.kv_up_proj = nn.Linear(shape.kv_rank, shape.heads * (shape.head + shape.value), bias=False)

    def forward(
        self, x_BLD: Tensor, state: LatentState | None, sink_H: Tensor | None, segments_BL: Tensor | None = None
    ) -> tuple[Tensor, LatentState | None]:
        """Return (B, H, L, V) and the next state, None where none was given; ``segments_BL``: see ``Block.forward``."""
        shape, length = self.shape, x_BLD.shape[1]
        past = 0 if state is None else state.latent_BTN.shape[1]
        angles = None
        if shape.rope_base is not None and segments_BL is not None:
            angles = rotation_by_document(segments_BL, shape.rotary, shape.rope_base)
        elif shape.rope_base is not None:
            angles = rotation(past, length, shape.rotary, shape.rope_base, x_BLD.device)
        q_BHLP, latent_BTN = self.project(x_BLD, angles, self.q_norm, self.kv_norm)
        if state is not None:
            latent_BTN = torch.cat([state.latent_BTN.to(latent_BTN.dtype), latent_BTN], dim=1)
            state = LatentState(latent_BTN)
        kept, total = shape.head + shape.value, past + length
        # Multiplications of a head: L T (2 C + R) + L C (P + V) over latents, else L T (P + R + V) + T C (P + V).
        if (
            state is not None
            and self.reads_weight
            and length * (total * (2 * shape.kv_rank - kept) + shape.kv_rank * kept) < total * shape.kv_rank * kept
        ):
            return self.over_latents(q_BHLP, latent_BTN, sink_H), state
        c_BTC, r_BTR = torch.split(latent_BTN, [shape.kv_rank, shape.rotary], dim=-1)
        kv_BHTW = self.kv_up_proj(c_BTC).unflatten(-1, (shape.heads, kept)).transpose(1, 2)
        k_BHTP, v_BHTV = kv_BHTW.split([shape.head, shape.value], dim=-1)
        k_BHTP = torch.cat([k_BHTP, r_BTR[:, None].expand(-1, shape.heads, -1, -1)], dim=-1)
        y_BHLV = softmax_attention(
            q_BHLP,
            k_BHTP,
            v_BHTV,
            scale=self.scale,
            softcap=self.softcap,
            sink_H=sink_H,
            segments_BL=segments_BL,
            impl=self.impl,
        )
        return y_BHLV, state

    @property
    def reads_weight(self) -> bool:
        """Whether ``kv_up_proj`` is its weight and nothing else: no adapter is around it."""
        return type(self.kv_up_proj) is nn.Linear

    def over_latents(self, q_BHLP: Tensor, latent_BTN: Tensor, sink_H: Tensor | None) -> Tensor:
        """Return (B, H, L, V) for the last L positions without expanding the latents."""
        shape = self.shape
        up_HWC = torch.unflatten(self.kv_up_proj.weight, 0, (shape.heads, shape.head + shape.value))
        k_up_HPC, v_up_HVC = torch.split(up_HWC, [shape.head, shape.value], dim=1)
        q_BHLP, q_BHLR = torch.split(q_BHLP, [shape.head, shape.rotary], dim=-1)
        q_BHLN = torch.cat([q_BHLP @ k_up_HPC, q_BHLR], dim=-1)
        keys_B1TN = latent_BTN[:, None].to(q_BHLN.dtype)
        y_BHLN = softmax_attention(
            q_BHLN,
            keys_B1TN,
            keys_B1TN,  # values of which the first C channels are wanted: one width, and no copy
            scale=self.scale if self.scale is not None else (shape.head + shape.rotary) ** -0.5,
            softcap=self.softcap,
            sink_H=sink_H,
            impl=self.impl,
        )
        y_BHLV: Tensor = y_BHLN[..., : shape.kv_rank] @ v_up_HVC.transpose(1, 2)
        return y_BHLV

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LatentState:
        """Return the state of a sequence of which nothing has been read yet."""
        width = self.shape.kv_rank + self.shape.rotary
        return LatentState(torch.empty(batch_size, 0, width, device=device, dtype=dtype))

    def reset_parameters(self, init_scale: float) -> None:
        """Draw truncated-normal matrices, zero biases, norms of 1."""
        for linear in (self.down_proj, self.q_up_proj, self.kv_up_proj):
            if linear is not None:
                truncated_normal_(linear.weight, linear.in_features, init_scale)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                norm.reset_parameters()

    def project(
        self, x_BLD: Tensor, angles: tuple[Tensor, Tensor] | None, q_norm: _Norm | None, kv_norm: _Norm
    ) -> tuple[Tensor, Tensor]:
        """Return queries (B, H, L, P + R) and latents (B, L, C + R), turned by angles of shape (L, h) or (B, L, h)."""
        shape = self.shape
        first = shape.q_rank or shape.query
        q_BLQ, c_BLC, r_BLR = self.down_proj(x_BLD).split([first, shape.kv_rank, shape.rotary], dim=-1)
        if q_norm is not None and self.q_up_proj is not None:
            q_BLQ = self.q_up_proj(q_norm(q_BLQ))
        q_BHLP = q_BLQ.unflatten(-1, (shape.heads, shape.head + shape.rotary)).transpose(1, 2)
        if angles is not None:
            q_BHLP, q_BHLR = q_BHLP.split([shape.head, shape.rotary], dim=-1)
            of_heads = [part[:, None] if part.ndim == 3 else part for part in angles]
            q_BHLP = torch.cat([q_BHLP, rotate(q_BHLR, *of_heads)], dim=-1)
            r_BLR = rotate(r_BLR, *angles)
        return q_BHLP, torch.cat([kv_norm(c_BLC), r_BLR], dim=-1)


class LatentCache:
    """Results of all heads for one token after another, over a cache with spare positions: no token copies it."""

    def __init__(self, attention: LatentAttention, state: LatentState) -> None:
        self._attention = attention
        self._latent_BTN, self._read = state.latent_BTN, state.latent_BTN.shape[1]
        self._q_norm = None if attention.q_norm is None else one_row(attention.q_norm)
        self._kv_norm = one_row(attention.kv_norm)
        shape, device = attention.shape, state.latent_BTN.device
        self._angles = None if shape.rope_base is None else Angles(shape.rotary, shape.rope_base, device)

    def __call__(self, x_BD: Tensor, sink_H: Tensor | None) -> Tensor:
        """Return (B, H, V) after reading x (B, D), which the layer's norm has been applied to."""
        angles = None if self._angles is None else self._angles.at(self._read)
        q_BHLP, new_BLN = self._attention.project(x_BD[:, None], angles, self._q_norm, self._kv_norm)
        if self._read == self._latent_BTN.shape[1]:
            old_BTN = self._latent_BTN
            self._latent_BTN = old_BTN.new_empty(old_BTN.shape[0], next_capacity(self._read), old_BTN.shape[2])
            self._latent_BTN[:, : self._read] = old_BTN
        self._latent_BTN[:, self._read] = new_BLN[:, 0]
        self._read += 1
        return self._attention.over_latents(q_BHLP, self._latent_BTN[:, : self._read], sink_H)[:, :, 0]


def next_capacity(positions: int) -> int:
    """Return the next size of a cache that is full at ``positions``: half as many again, at least 64 more."""
    return positions + max(64, positions // 2)
