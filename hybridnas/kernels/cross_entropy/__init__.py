"""The loss of language models: cross-entropy, and with it the head's matmul, without all logits at once.

Shapes: N tokens (in any number of leading dimensions), D features, V vocabulary. ``reference.py`` is the
specification, ``eager.py`` works in chunks of tokens, whose rows ``native.py`` computes on a processor and
``triton.py`` on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import refused, require_tensor, state_dtype
from hybridnas.kernels.cross_entropy import native
from hybridnas.kernels.cross_entropy.eager import (
    chunk_rows,
    cross_entropy_eager,
    linear_cross_entropy_eager,
    matmul_dtype,
    require_in_vocabulary,
    scores_eager,
)
from hybridnas.kernels.cross_entropy.reference import (
    cross_entropy_reference,
    linear_cross_entropy_reference,
    scores_reference,
)

OPERATION = Operation(
    "cross_entropy",
    "with the head in chunks of tokens where the logits exceed 8 MiB",
    native=native.compiled,
    native_available=native.available,
    triton=True,
    triton_dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
)
describe = OPERATION.describe
_OPERATIONS = {
    name: OPERATION._replace(name=name) for name in ("cross_entropy", "linear_cross_entropy", "token_scores")
}
_REDUCTIONS = ("mean", "sum", "none")


class TokenScores(NamedTuple):
    """What evaluation reads per token, in the targets' shape; 0 and False where a token does not count."""

    loss: Tensor  # nats, float32 (float64 for float64 inputs)
    logsumexp: Tensor  # logarithm of the softmax's normaliser
    correct: Tensor  # bool: the likeliest token is the target


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    impl: str | Impl = Impl.AUTO,
) -> Tensor:
    """Return the cross-entropy [nats] of ``logits = x weight^T`` against ``targets``, in float32 or wider.

    x (..., D); weight (V, D), of x's dtype unless autocast is on; targets (...) integers; ``mask`` (...) bool, False
    where a token does not count, like a target of ``ignore_index``. ``reduction``: mean over the tokens that count
    (0 when there are none), sum, or none: (...). ``z_loss`` times the squared logarithm of the softmax's normalizer is
    added to every token's loss, which keeps that near 0 (PaLM, 2204.02311, section 5). x and weight are
    differentiable, once. ``impl``: see ``Impl``; torch works in chunks of tokens, native and triton the same with rows
    in C and Triton. Where auto takes torch it has all logits at once if no token may be left out and they fill no more
    than one chunk (8 MiB), which is as fast there.

    Raises KernelInputError for a wrong rank, shape, dtype, device or target, ConfigError for an unknown reduction,
    KernelUnavailableError for an implementation that cannot run here. Source: the idea is Liger's, arXiv 2410.10989.
    """
    x_ND, weight, targets_N = _checked(x, weight, targets, mask, ignore_index, reduction)
    chosen = _OPERATIONS["linear_cross_entropy"].choose(impl, x.device, dtypes_of(x_ND, weight))
    small = mask is None and _is_small(x_ND.shape[0], weight.shape[0])
    if Impl.of(impl) is Impl.AUTO and chosen is Impl.TORCH and small:
        return _torchs_own(_plain_linear(x_ND, weight), targets, targets_N, ignore_index, reduction, z_loss)
    if chosen is Impl.REFERENCE:
        loss_N, _ = linear_cross_entropy_reference(x_ND, weight, targets_N, ignore_index, z_loss)
        return _reduced(loss_N.sum(), loss_N, targets, targets_N, ignore_index, reduction)
    total, loss_N, _ = linear_cross_entropy_eager(
        x_ND,
        weight,
        targets_N,
        ignore_index,
        per_token=reduction == "none",
        z_loss=z_loss,
        rows=chosen.value,
    )
    return _reduced(total, loss_N, targets, targets_N, ignore_index, reduction)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    impl: str | Impl = Impl.AUTO,
) -> Tensor:
    """Return the cross-entropy [nats] of logits (..., V), for a head that must show its logits anyway.

    Arguments, result and errors as in ``linear_cross_entropy``; where auto takes torch it is F.cross_entropy up to
    8 MiB of float32 logits. Else only the logits are kept for the backward, where torch keeps their log-softmax too.
    """
    _check("cross_entropy", "logits", "(..., V)", logits, targets, mask, reduction)
    logits_NV, targets_N = logits.flatten(0, -2), _effective(targets, mask, ignore_index)
    chosen = _OPERATIONS["cross_entropy"].choose(impl, logits.device, dtypes_of(logits))
    if Impl.of(impl) is Impl.AUTO and chosen is Impl.TORCH and _is_small(*logits_NV.shape):
        return _torchs_own(logits_NV, targets, targets_N, ignore_index, reduction, z_loss)
    if chosen is Impl.REFERENCE:
        loss_N, _ = cross_entropy_reference(logits_NV, targets_N, ignore_index, z_loss)
    else:
        loss_N, _ = cross_entropy_eager(logits_NV, targets_N, ignore_index, z_loss=z_loss, rows=chosen.value)
    return _reduced(loss_N.sum(), loss_N, targets, targets_N, ignore_index, reduction)


def token_scores(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> TokenScores:
    """Return every token's loss, normaliser and hit, for evaluation: chunk by chunk, without gradients.

    Arguments and errors as in ``linear_cross_entropy``.
    """
    x_ND, weight, targets_N = _checked(x, weight, targets, mask, ignore_index, "none")
    chosen = _OPERATIONS["token_scores"].choose(impl, x.device, dtypes_of(x_ND, weight))
    if chosen is Impl.REFERENCE:
        scores = scores_reference(x_ND, weight, targets_N, ignore_index)
    else:
        scores = scores_eager(x_ND, weight, targets_N, ignore_index, rows=chosen.value)
    return TokenScores(*(v.view(targets.shape) for v in scores))


def _torchs_own(
    logits_NV: Tensor, targets: Tensor, targets_N: Tensor, ignore_index: int, reduction: str, z_loss: float
) -> Tensor:
    if not torch.compiler.is_compiling():
        require_in_vocabulary(targets_N[targets_N != ignore_index], logits_NV.shape[1], ignore_index)
    kind = "none" if reduction == "none" else "sum"
    logits_NV = logits_NV.to(state_dtype(logits_NV))
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction=kind)
    if z_loss:
        squares_N = (z_loss * logits_NV.logsumexp(-1).square()).masked_fill(targets_N == ignore_index, 0.0)
        loss = loss + (squares_N if reduction == "none" else squares_N.sum())
    return _reduced(loss, loss, targets, targets_N, ignore_index, reduction)


def _plain_linear(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """All logits, by a matmul in the dtype that this device multiplies."""
    narrow = matmul_dtype(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.linear(x_ND.to(narrow), weight_VD.to(narrow))


def _is_small(tokens: int, vocabulary: int) -> bool:
    return tokens <= chunk_rows(vocabulary)


def _checked(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (N, D) and weight in one dtype, autocast's where it is on, and the targets (N,)."""
    name = "linear_cross_entropy"
    _check(name, "x", "(..., D)", x, targets, mask, reduction)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    require_tensor(name, "weight", weight, "(V, D)", (rows, x.shape[-1]), x.device)
    if rows == 0:
        got = tuple(weight.shape)
        raise refused(name, "weight", f"must have at least one token (V, D), got {got}", got, "V >= 1")
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    if x.dtype != weight.dtype:
        raise refused(name, "weight", f"must be {x.dtype} like x, got {weight.dtype}", weight.dtype, x.dtype)
    return x.flatten(0, -2), weight, _effective(targets, mask, ignore_index)


def _check(
    operation: str, name: str, letters: str, x: Tensor, targets: Tensor, mask: Tensor | None, reduction: str
) -> None:
    if reduction not in _REDUCTIONS:
        message = f"{operation} reduction={reduction!r} must be one of {', '.join(_REDUCTIONS)}"
        raise ConfigError(message, field="reduction", got=reduction, allowed=_REDUCTIONS)
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] == 0 or not x.is_floating_point():
        got = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        must = f"must be a floating-point tensor {letters}, not empty, got {got}"
        raise refused(operation, name, must, got, f"floating-point tensor {letters}")
    _check_integers(operation, name, x, "targets", targets)
    if mask is not None:
        _check_integers(operation, name, x, "mask", mask)


def _check_integers(operation: str, name: str, x: Tensor, label: str, value: Tensor) -> None:
    kind = "bool" if label == "mask" else "integer"
    got = value.dtype if isinstance(value, Tensor) else None
    right = got == torch.bool if kind == "bool" else got in (torch.int64, torch.int32, torch.int16, torch.uint8)
    if not right:
        given = got or type(value).__name__
        raise refused(operation, label, f"must be a tensor of {kind}s, got {given}", given, f"{kind}s")
    shape = tuple(x.shape[:-1])
    if value.shape != shape:
        must = f"must have shape {shape} like {name}, got {tuple(value.shape)}"
        raise refused(operation, label, must, tuple(value.shape), shape)
    if value.device != x.device:
        must = f"must be on {x.device} like {name}, got {value.device}"
        raise refused(operation, label, must, value.device, x.device)


def _effective(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    targets_N = targets.reshape(-1).long()
    return targets_N if mask is None else targets_N.masked_fill(~mask.reshape(-1), ignore_index)


def _reduced(
    total: Tensor, loss_N: Tensor, targets: Tensor, targets_N: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    if reduction == "none":
        return loss_N.view(targets.shape)
    return total / (targets_N != ignore_index).sum().clamp(min=1) if reduction == "mean" else total
