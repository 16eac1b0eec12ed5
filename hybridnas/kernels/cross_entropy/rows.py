"""Losses of a chunk of logits, and their gradients, in torch; the Triton twin is ``triton.py``.

Shapes: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybridnas.errors import KernelInputError
from hybridnas.kernels._inputs import state_dtype


def row_function(triton: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return who computes the rows: ``losses`` below, or the Triton kernel of the same signature."""
    if not triton:
        return losses
    from hybridnas.kernels.cross_entropy.triton import losses as triton_losses

    return triton_losses


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def require_in_vocabulary(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise KernelInputError for a target that is no token; looked at on a CPU only, where it costs no waiting."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= vocabulary:
        raise KernelInputError(
            f"cross_entropy targets must be in 0..{vocabulary - 1} or ignore_index={ignore_index}, "
            f"got {low if low < 0 else high}"
        )


def losses(
    logits_TV: Tensor, targets_T: Tensor, scale_T: Tensor | None, out_TV: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return losses and logarithms of the normalisers (T,); ``out`` is working memory, and holds, where ``gradient``,
    the gradient of sum(scale * loss) by the logits.

    softmax is torch's only fused pass over rows; the normaliser is read off the likeliest token, whose probability
    is at least 1 / V and so never vanishes.
    """
    wide = state_dtype(logits_TV)
    logits_TV = logits_TV.to(wide)
    chosen_T = logits_TV.gather(1, targets_T[:, None])[:, 0]
    peak_T = logits_TV.amax(1)
    p_TV = out_TV if out_TV.dtype == wide else torch.empty_like(logits_TV)
    torch.softmax(logits_TV, 1, out=p_TV)
    logsumexp_T = peak_T - p_TV.amax(1).log_()
    if gradient:
        p_TV.scatter_add_(1, targets_T[:, None], p_TV.new_full((1, 1), -1.0).expand(p_TV.shape[0], 1))
        if scale_T is not None:
            p_TV.mul_(scale_T[:, None])
        if p_TV is not out_TV:
            out_TV.copy_(p_TV)
    return logsumexp_T - chosen_T, logsumexp_T
