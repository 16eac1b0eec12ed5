"""Cross-entropy as textbooks write it: the specification, in float32 or wider, differentiable by plain autograd.

Shapes: N tokens, D features, V vocabulary.

    loss_n = z_n - logits_n,target(n) + z_loss z_n^2 with z_n = log(sum_v exp(logits_nv)),
    0 where target(n) is the ignored index
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.kernels._inputs import state_dtype


def cross_entropy_reference(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the loss of every token (N,) [nats] and the logarithm of its normaliser (N,), both 0 where ignored."""
    logits_NV = logits_NV.to(state_dtype(logits_NV))
    counts_N = targets_N != ignore_index
    index_N1 = targets_N.masked_fill(~counts_N, 0)[:, None]
    logsumexp_N = torch.logsumexp(logits_NV, 1)
    loss_N = logsumexp_N - logits_NV.gather(1, index_N1)[:, 0] + z_loss * logsumexp_N.square()
    zero_N = torch.zeros_like(loss_N)
    return torch.where(counts_N, loss_N, zero_N), torch.where(counts_N, logsumexp_N, zero_N)


def linear_cross_entropy_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same for ``logits = x weight^T``, all of them at once."""
    dtype = state_dtype(x_ND, weight_VD)
    return cross_entropy_reference(x_ND.to(dtype) @ weight_VD.to(dtype).t(), targets_N, ignore_index, z_loss)


@torch.no_grad()
def scores_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and normalisers (N,), and whether the likeliest token (the first of equals) is the target."""
    dtype = state_dtype(x_ND, weight_VD)
    logits_NV = x_ND.to(dtype) @ weight_VD.to(dtype).t()
    correct_N = (logits_NV.argmax(1) == targets_N) & (targets_N != ignore_index)
    return *cross_entropy_reference(logits_NV, targets_N, ignore_index), correct_N
