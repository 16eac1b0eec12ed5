"""Losses of rows of logits on a GPU: the host's side of ``triton_kernels.py``, with the signature of ``eager.losses``.

Imports triton at its top: imported only where it runs. Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.kernels._inputs import state_dtype
from hybridnas.kernels._triton.launch import Tile, launch
from hybridnas.kernels._triton.shapes import power_of_two
from hybridnas.kernels.cross_entropy import triton_kernels as kernels

_TILES = ((1024, 4), (4096, 8))  # columns, warps: 8 and 16 numbers a thread


def tiles(vocabulary: int) -> list[Tile]:
    """Return the tiles to choose from for rows of this length, the likely best first."""
    if vocabulary <= 1024:
        columns = max(64, power_of_two(vocabulary))
        return [Tile.of(max(1, columns // 256), BLOCK=columns)]
    return [Tile.of(warps, BLOCK=columns) for columns, warps in _TILES if columns <= power_of_two(vocabulary)]


def losses(
    logits_TV: Tensor,
    targets_T: Tensor,
    scale_T: Tensor | None,
    out_TV: Tensor,
    *,
    gradient: bool,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return losses and normalisers (T,); with ``gradient``, fill ``out`` with that of sum(scale * loss)."""
    count, vocabulary = logits_TV.shape
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    loss_T = logits_TV.new_empty(count, dtype=state_dtype(logits_TV))
    logsumexp_T = loss_T.new_empty(count)
    if count:
        launch(
            kernels.cross_entropy_rows,
            lambda constants: count,
            tiles(vocabulary),
            ("V", "GRADIENT", "Z_LOSS"),
            logits_TV.device,
            logits=logits_TV,
            targets=targets_T.int(),
            scale=scale_T if scale_T is None else scale_T.contiguous(),
            out=out_TV if gradient else None,
            loss=loss_T,
            logsumexp=logsumexp_T,
            V=vocabulary,
            logits_row=logits_TV.stride(0),
            out_row=out_TV.stride(0) if gradient else 0,
            GRADIENT=gradient,
            Z_LOSS=z_loss,
        )
    return loss_T, logsumexp_T
