"""Causal softmax attention on tensors: all earlier keys or a window of them, soft-capped scores, a sink per head.

Without a cap and a sink the work is torch's ``scaled_dot_product_attention``; with one of them the scores are written
out, some queries at a time against the keys before them. A window costs time and memory linear in the length: blocks of
queries against the keys that they can see.

Shapes: B batch, H query heads, K key heads (H a multiple), L queries, T >= L keys, P head width, V value width,
W window, g = H / K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.layers.segments import same_document

_ROWS = 256  # queries whose scores are written out together


def softmax_attention(
    q_BHLP: Tensor,
    k_BKTP: Tensor,
    v_BKTV: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    segments_BL: Tensor | None = None,
    impl: Impl = Impl.AUTO,
) -> Tensor:
    """Return (B, H, L, V): query i, at position T - L + i, over the keys up to its own position, at most ``window``.

    ``scale`` multiplies the scores, by default P ** -0.5; ``softcap`` c makes a score s c * tanh(s / c) (Gemma 2,
    2408.00118); ``sink_H`` is a logit per head that takes part in the softmax and brings no value (gpt-oss,
    2508.10925). ``segments_BL``, for L = T: the number of each position's document, beyond which a query sees no key.
    ``impl='reference'`` writes everything out with one mask.
    """
    length, total = q_BHLP.shape[2], k_BKTP.shape[2]
    past = total - length
    how = _Scores(scale, softcap, sink_H, impl)
    if impl is Impl.REFERENCE or (window is not None and isinstance(total, torch.SymInt)):
        mask_LT = _visible(length, past, window, q_BHLP.device)
        if segments_BL is not None:
            mask_LT = mask_LT & same_document(segments_BL, segments_BL)[:, None]
        return how.attend(q_BHLP, k_BKTP, v_BKTV, mask_LT)
    if window is None or total <= window:
        if past == 0 or length == 1:  # a symbolic length compares to a symbol
            causal = bool(past == 0 and length > 1)
            return how.attend(q_BHLP, k_BKTP, v_BKTV, None, causal, segments_BL if causal else None)
        return how.attend(q_BHLP, k_BKTP, v_BKTV, _visible(length, past, None, q_BHLP.device))
    if length == 1:
        return how.attend(q_BHLP, k_BKTP[:, :, -window:], v_BKTV[:, :, -window:], None)
    # The first queries see no more than the first ``window`` keys; each of the others sees exactly ``window``.
    head = min(length, max(0, window - past))
    first, oldest = past + head, past + head - window + 1
    parts = []
    if head:
        mask = None if past == 0 else _visible(head, past, None, q_BHLP.device)
        own = None if segments_BL is None else segments_BL[:, :head]
        parts.append(how.attend(q_BHLP[:, :, :head], k_BKTP[:, :, :first], v_BKTV[:, :, :first], mask, past == 0, own))
    of = None if segments_BL is None else (segments_BL[:, head:], segments_BL[:, oldest:])
    parts.append(_in_blocks(how, q_BHLP[:, :, head:], k_BKTP[:, :, oldest:], v_BKTV[:, :, oldest:], window, of))
    return torch.cat(parts, dim=2)


def scored_pairs(length: int, window: int | None, *, written_out: bool = False) -> int:
    """Return how many products of a query and a key a head makes over a fresh sequence: what is masked is counted.

    Without a window that is ``length`` squared, or some more than half of it where scores are ``written_out`` (with a
    cap or a sink); with one it grows linearly, as ``softmax_attention`` cuts its blocks.
    """
    if window is None or length <= window:
        if not written_out:
            return length**2
        whole, rest = divmod(length, _ROWS)
        return _ROWS**2 * whole * (whole + 1) // 2 + rest * length
    block = _block(window)
    blocks = -(-(length - window) // block)
    return scored_pairs(window, None, written_out=written_out) + blocks * block * (window - 1 + block)


def scored_width(query: int, value: int, *, written_out: bool) -> int:
    """Return the multiplications of a query with a key and of their weight with a value: both of the wider width.

    ``written_out``: with a cap or a sink, which widens nothing.
    """
    return query + value if written_out else 2 * max(query, value)


def _block(window: int) -> int:
    """Return how many queries share the keys of one block."""
    return max(32, window // 2)


class _Scores:
    """How a score becomes a weight, and the two ways to compute it."""

    def __init__(self, scale: float | None, softcap: float | None, sink_H: Tensor | None, impl: Impl) -> None:
        self.scale, self.softcap, self.sink_H = scale, softcap, sink_H
        self.written_out = softcap is not None or sink_H is not None or impl is Impl.REFERENCE

    def attend(
        self,
        q_BHLP: Tensor,
        k_BKTP: Tensor,
        v_BKTV: Tensor,
        mask_LT: Tensor | None,
        causal: bool = False,
        segments_BL: Tensor | None = None,
    ) -> Tensor:
        """Return (B, H, L, V); ``mask`` (L, T) or (B, 1, L, T) is true where a query sees a key.

        ``causal`` is the mask of L = T, and with ``segments`` that within each document.
        """
        (heads, length), keys, values = q_BHLP.shape[1:3], k_BKTP.shape[1], v_BKTV.shape[3]
        groups = heads // keys
        if segments_BL is not None and not (self.written_out and length > _ROWS):
            mask_LT = _visible(length, 0, None, q_BHLP.device) & same_document(segments_BL, segments_BL)[:, None]
            causal = False
        if not self.written_out:
            scale = self.scale
            if values != q_BHLP.shape[3]:  # the fused kernels take one width
                scale = scale if scale is not None else q_BHLP.shape[3] ** -0.5
                q_BHLP, k_BKTP, v_BKTV = _widened(q_BHLP, k_BKTP, v_BKTV)
            if length == 1 and groups > 1:  # the heads as rows: no key is copied for each of them
                q_BKgP = q_BHLP.reshape(q_BHLP.shape[0], keys, groups, q_BHLP.shape[3])
                y_BHLV = F.scaled_dot_product_attention(q_BKgP, k_BKTP, v_BKTV, scale=scale).reshape(q_BHLP.shape)
            else:
                y_BHLV = F.scaled_dot_product_attention(
                    q_BHLP, k_BKTP, v_BKTV, mask_LT, is_causal=causal, scale=scale, enable_gqa=groups > 1
                )
            return y_BHLV[..., :values]
        if causal and not isinstance(length, torch.SymInt) and length > _ROWS:
            parts: list[Tensor] = []
            for start in range(0, length, _ROWS):
                end = min(length, start + _ROWS)
                mask_LT = _visible(end - start, start, None, q_BHLP.device)
                if segments_BL is not None:
                    mask_LT = mask_LT & same_document(segments_BL[:, start:end], segments_BL[:, :end])[:, None]
                rows_BHLP, seen = q_BHLP[:, :, start:end], (k_BKTP[:, :, :end], v_BKTV[:, :, :end])
                parts.append(self.attend(rows_BHLP, *seen, mask_LT))
            return torch.cat(parts, dim=2)
        if causal:
            mask_LT = _visible(length, 0, None, q_BHLP.device)
        sink = None if self.sink_H is None else self.sink_H.view(keys, groups, 1, 1)
        q_BKRP = torch.unflatten(q_BHLP, 1, (keys, groups)).flatten(2, 3)
        y_BKRV = self.write_out(q_BKRP, k_BKTP, v_BKTV, mask_LT, groups, sink)
        return torch.unflatten(y_BKRV, 2, (groups, length)).flatten(1, 2)

    def write_out(
        self, q_XKRP: Tensor, k_XKTP: Tensor, v_XKTV: Tensor, mask_LT: Tensor | None, groups: int, sink: Tensor | None
    ) -> Tensor:
        """Return (X, K, R, V) for the R = g L rows of the g heads that read the same keys, softmax in float32 or wider.

        ``sink`` broadcasts to (X, K, g, 1, 1).
        """
        scale = self.scale if self.scale is not None else q_XKRP.shape[-1] ** -0.5
        scores = (q_XKRP * scale) @ k_XKTP.transpose(-1, -2)
        scores = torch.unflatten(scores, 2, (groups, q_XKRP.shape[2] // groups))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask_LT is not None:  # with a batch dimension one for the groups, too
            mask_LT = mask_LT.unsqueeze(-3) if mask_LT.ndim == scores.ndim - 1 else mask_LT
            scores = scores.masked_fill(~mask_LT, float("-inf"))
        if sink is None:
            weights = scores.softmax(dim=-1)
        else:
            logit = sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, logit], dim=-1).softmax(dim=-1)[..., :-1]
        y_XKRV: Tensor = weights.flatten(2, 3).to(v_XKTV.dtype) @ v_XKTV
        return y_XKRV


def _in_blocks(
    how: _Scores,
    q_BHLP: Tensor,
    k_BKTP: Tensor,
    v_BKTV: Tensor,
    window: int,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return (B, H, L, V) where query i sees keys i to i + window - 1, of T = L + window - 1 keys.

    ``segments``: the documents of queries (B, L) and of keys (B, T), of which a query sees its own alone.
    Shapes: n blocks of b queries, S = b + window - 1 keys that a block's queries see, X = B K.
    """
    batch, heads, length, _ = q_BHLP.shape
    keys, block = k_BKTP.shape[1], _block(window)
    groups, span = heads // keys, block + window - 1
    blocks = -(-length // block)
    missing = blocks * block - length
    q_BHLP, k_BKTP, v_BKTV = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (q_BHLP, k_BKTP, v_BKTV))
    q_XnRP = q_BHLP.reshape(batch * keys, groups, blocks, block, q_BHLP.shape[3]).transpose(1, 2).flatten(2, 3)
    k_XnSP, v_XnSV = (  # overlapping views
        x.reshape(batch * keys, x.shape[2], x.shape[3]).unfold(1, span, block).transpose(2, 3) for x in (k_BKTP, v_BKTV)
    )
    ahead_bS = torch.arange(span, device=q_BHLP.device) - torch.arange(block, device=q_BHLP.device)[:, None]
    mask_bS = (ahead_bS >= 0) & (ahead_bS < window)
    if segments is not None:  # (X, n, b, S); what is padded is of the last document, so that every query sees a key
        query_BL, key_BT = (torch.cat([s, s[:, -1:].expand(-1, missing)], dim=1) for s in segments)
        same = query_BL.reshape(batch, blocks, block, 1) == key_BT.unfold(1, span, block)[:, :, None]
        mask_bS = (mask_bS & same).repeat_interleave(keys, dim=0)
    if how.written_out:
        sink = None if how.sink_H is None else how.sink_H.view(keys, 1, groups, 1, 1).repeat(batch, 1, 1, 1, 1)
        y_XnRV = how.write_out(q_XnRP, k_XnSP, v_XnSV, mask_bS, groups, sink)
    else:
        mask_RS = torch.cat([mask_bS] * groups, dim=-2)
        y_XnRV = F.scaled_dot_product_attention(q_XnRP, k_XnSP, v_XnSV, attn_mask=mask_RS, scale=how.scale)
    y_XgTV = torch.unflatten(y_XnRV, 2, (groups, block)).transpose(1, 2).flatten(2, 3)
    return y_XgTV.reshape(batch, heads, blocks * block, v_BKTV.shape[3])[:, :, :length]


def _widened(*tensors: Tensor) -> list[Tensor]:
    """Return tensors with zero channels at the end, so that all have the width of the widest."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


def _visible(length: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """Return (L, T) bool, true where query i, at position past + i, sees a key."""
    mask_LT = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return mask_LT if window is None else mask_LT.triu(past - window + 1)
