"""Cross-entropy of logits, and of the head's matmul with it chunk by chunk, as custom operators.

Of given logits only these are kept for the backward, where torch keeps their log-softmax too. With the head only one
chunk of logits exists at a time. Where the gradient of the sum is wanted, a chunk's logits become its gradient on the
spot (the idea of Liger's and FLA's fused losses): three matmuls as in the plain form, no second pass. Gradients of
single tokens' losses are not known at that time, so these cost one matmul more. On a CPU the rows that do not count
are left out of every matmul. ``rows`` names what computes the rows of a chunk: ``torch`` here, ``native.py`` or
``triton.py``.
Shapes: N tokens, T tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._inputs import refused, state_dtype
from hybridnas.kernels._register import differentiable_once, register_differentiable_op, register_op
from hybridnas.kernels.cross_entropy import native

_FUSED_BYTES = 8 << 20  # logits of one chunk in float32: near the caches, with rows enough for matmuls at full speed
_FUSED_ROWS = 128  # at least: every chunk reads and writes the whole gradient of the weight
_CHUNK_BYTES = 1 << 20  # of float32 logits without a head: rows that stay in the cache from one pass to the next


def row_function(rows: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what computes the rows: ``losses`` below, or the C or Triton form of the same signature."""
    if rows == Impl.TORCH.value:
        return losses
    if rows == Impl.NATIVE.value:
        return native.losses
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
        got, allowed = low if low < 0 else high, f"0..{vocabulary - 1} or ignore_index={ignore_index}"
        raise refused("cross_entropy", "targets", f"must be in {allowed}, got {got}", got, allowed)


def losses(
    logits_TV: Tensor,
    targets_T: Tensor,
    scale_T: Tensor | None,
    out_TV: Tensor,
    *,
    gradient: bool,
    z_loss: float = 0.0,
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
        if z_loss:
            p_TV.mul_((1 + 2 * z_loss * logsumexp_T)[:, None])
        p_TV.scatter_add_(1, targets_T[:, None], p_TV.new_full((1, 1), -1.0).expand(p_TV.shape[0], 1))
        if scale_T is not None:
            p_TV.mul_(scale_T[:, None])
        if p_TV is not out_TV:
            out_TV.copy_(p_TV)
    loss_T = logsumexp_T - chosen_T
    return (loss_T + z_loss * logsumexp_T.square() if z_loss else loss_T), logsumexp_T


def _chunk_rows(logits: Tensor) -> int:
    """Return how many rows are done at once; all of them on a GPU, where a row is one program."""
    return max(1, _CHUNK_BYTES // (4 * logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0])


def _logits_forward(*args: Any) -> tuple[Tensor, Tensor]:
    logits, targets, ignore_index, z_loss, rows = args
    (count, vocabulary), size, wide = logits.shape, _chunk_rows(logits), state_dtype(logits)
    counts, run = targets != ignore_index, row_function(rows)
    require_in_vocabulary(targets[counts] if logits.device.type == "cpu" else targets, vocabulary, ignore_index)
    index = targets.masked_fill(~counts, 0)
    loss, logsumexp = logits.new_empty(count, dtype=wide), logits.new_empty(count, dtype=wide)
    memory = logits.new_empty(min(size, count), vocabulary, dtype=wide)
    for part in slices(count, size):
        out_TV = memory[: part.stop - part.start]
        loss[part], logsumexp[part] = run(logits[part], index[part], None, out_TV, gradient=False, z_loss=z_loss)
    zero = torch.zeros_like(loss)
    return torch.where(counts, loss, zero), torch.where(counts, logsumexp, zero)


def _fake_logits(*args: Any) -> tuple[Tensor, Tensor]:
    logits = args[0]
    loss = logits.new_empty(logits.shape[0], dtype=state_dtype(logits))
    return loss, torch.empty_like(loss)


def _logits_backward(*args: Any) -> Tensor:
    logits, targets, ignore_index, z_loss, rows, _, upstream = args
    counts, run = targets != ignore_index, row_function(rows)
    index, scale = targets.masked_fill(~counts, 0), torch.where(counts, upstream, torch.zeros_like(upstream))
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in slices(logits.shape[0], _chunk_rows(logits)):
        run(logits[part], index[part], scale[part], dlogits[part], gradient=True, z_loss=z_loss)
    return dlogits


register_differentiable_op(
    "cross_entropy",
    "Tensor logits, Tensor targets, int ignore_index, float z_loss, str rows",
    2,
    forward=_logits_forward,
    fake=_fake_logits,
    backward=_logits_backward,
    fake_gradients=lambda *args: torch.empty_like(args[0], memory_format=torch.contiguous_format),
    gradients=1,
)


def cross_entropy_eager(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, *, z_loss: float = 0.0, rows: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) and the logarithms of the normalisers (N,), 0 where ignored."""
    loss_N, logsumexp_N = torch.ops.hybridnas.cross_entropy(logits_NV, targets_N, ignore_index, z_loss, rows)
    return loss_N, logsumexp_N


def chunk_rows(vocabulary: int) -> int:
    """Return how many tokens one chunk of logits holds."""
    return max(_FUSED_ROWS, _FUSED_BYTES // (4 * vocabulary))


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls: bfloat16 only where the device multiplies it, float16 never.

    A processor without such instructions takes 12 times longer for bfloat16 than for float32, and the gradients of a
    large softmax vanish in float16.
    """
    if tensor.dtype == torch.bfloat16 and (tensor.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return state_dtype(tensor)


class _Counted(NamedTuple):
    """The rows that count; ``chosen`` says which they are, None where all rows are kept and ``ones`` marks those."""

    chosen: Tensor | None
    targets: Tensor
    ones: Tensor | None  # 1 where the row counts, else 0

    def take(self, values: Tensor) -> Tensor:
        return values if self.chosen is None else values[self.chosen]

    def put(self, values: Tensor, count: int) -> Tensor:
        """Return the values at their places among ``count`` rows, zero elsewhere."""
        if self.chosen is not None:
            return values.new_zeros(count, *values.shape[1:]).index_copy_(0, self.chosen, values)
        if self.ones is None:
            return values
        return torch.where(self.ones.bool(), values, torch.zeros_like(values))


def _counted(targets: Tensor, vocabulary: int, ignore_index: int, dtype: torch.dtype) -> _Counted:
    """Check the targets and leave out the rows that do not count; on a GPU keep all, choosing would wait for it."""
    counts = targets != ignore_index
    if targets.device.type != "cpu":
        return _Counted(None, targets.masked_fill(~counts, 0), counts.to(dtype))
    index = None
    if not bool(counts.all()):
        index = counts.nonzero()[:, 0]
        targets = targets[index]
    require_in_vocabulary(targets, vocabulary, ignore_index)
    return _Counted(index, targets, None)


def _fused(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    z_loss: float,
    need: tuple[bool, bool],
    rows: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return losses and normalisers (N,), and the gradients of sum(upstream * loss) that ``need`` asks for.

    The gradient by x has the dtype of the matmuls, the one by the weight that of the sums; an unneeded one is empty.
    """
    vocabulary, wide, narrow, count = weight.shape[0], state_dtype(x), matmul_dtype(x), x.shape[0]
    run, size = row_function(rows), chunk_rows(vocabulary)
    with torch.autocast(x.device.type, enabled=False):
        counted = _counted(targets, vocabulary, ignore_index, wide)
        scale = counted.ones
        if upstream is not None:
            scale = counted.take(upstream).to(wide) if scale is None else scale * upstream
        x, weight = counted.take(x).to(narrow), weight.to(narrow)
        loss, logsumexp = x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=wide)
        dx = x.new_empty(x.shape if need[0] else 0)
        dweight = x.new_zeros(weight.shape if need[1] else 0, dtype=wide)
        # in C the gradient takes the place of the logits
        buffers = x.new_empty(1 if rows == Impl.NATIVE.value else 2, min(size, x.shape[0]), vocabulary)
        for part in slices(x.shape[0], size):
            logits_TV, gradient_TV = (buffers[i, : part.stop - part.start] for i in (0, -1))
            torch.mm(x[part], weight.t(), out=logits_TV)
            scale_T = None if scale is None else scale[part]
            loss[part], logsumexp[part] = run(
                logits_TV, counted.targets[part], scale_T, gradient_TV, gradient=any(need), z_loss=z_loss
            )
            if need[0]:
                torch.mm(gradient_TV, weight, out=dx[part])
            if need[1] and narrow == wide:
                dweight.addmm_(gradient_TV.t(), x[part])
            elif need[1]:
                dweight.add_(torch.mm(gradient_TV.t(), x[part]))
        loss, logsumexp = counted.put(loss, count), counted.put(logsumexp, count)
        return loss, logsumexp, counted.put(dx, count) if need[0] and counted.ones is None else dx, dweight


_INPUTS = "Tensor x, Tensor weight, Tensor targets"
_OPTIONS = "int ignore_index, float z_loss, bool need_dx, bool need_dweight, str rows"


def _head_forward(*args: Any) -> tuple[Tensor, ...]:
    x, weight, targets, ignore_index, z_loss, need_dx, need_dweight, rows = args
    loss_N, *rest = _fused(x, weight, targets, None, ignore_index, z_loss, (need_dx, need_dweight), rows)
    return loss_N.sum(), loss_N, *rest


def _gradients_like(x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0, dtype=matmul_dtype(x))
    return dx, x.new_empty(weight.shape if need_dweight else 0, dtype=state_dtype(x))


def _fake_head(*args: Any) -> tuple[Tensor, ...]:
    x, weight, _, _, _, need_dx, need_dweight, _ = args
    loss_N = x.new_empty(x.shape[0], dtype=state_dtype(x))
    return loss_N.new_empty(()), loss_N, torch.empty_like(loss_N), *_gradients_like(x, weight, need_dx, need_dweight)


def _head_backward(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, targets, upstream, ignore_index, z_loss, need_dx, need_dweight, rows = args
    return _fused(x, weight, targets, upstream, ignore_index, z_loss, (need_dx, need_dweight), rows)[2:]


def _fake_head_backward(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, _, _, _, _, need_dx, need_dweight, _ = args
    return _gradients_like(x, weight, need_dx, need_dweight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, *ctx.options = inputs
    _, _, logsumexp_N, dx, dweight = output
    ctx.mark_non_differentiable(logsumexp_N, dx, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, targets, dx, dweight)


@differentiable_once("linear_cross_entropy")
def _backpropagate(ctx: Any, dtotal: Tensor | None, dloss_N: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, weight, targets, dx, dweight = ctx.saved_tensors
    ignore_index, z_loss, had_dx, had_dweight, rows = ctx.options
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if dloss_N is None and dtotal is not None and had_dx >= need_dx and had_dweight >= need_dweight:
        dx, dweight = (dx * dtotal if need_dx else dx), (dweight * dtotal if need_dweight else dweight)
    else:
        upstream_N = x.new_zeros(x.shape[0], dtype=state_dtype(x)) if dloss_N is None else dloss_N
        upstream_N = upstream_N if dtotal is None else upstream_N + dtotal
        dx, dweight = torch.ops.hybridnas.linear_cross_entropy_backward(
            x, weight, targets, upstream_N, ignore_index, z_loss, need_dx, need_dweight, rows
        )
    gradients = (dx.to(x.dtype) if need_dx else None, dweight.to(weight.dtype) if need_dweight else None)
    return *gradients, None, None, None, None, None, None


# the backward depends on which of the losses is differentiated, which the general helper does not know
register_op("linear_cross_entropy", f"{_INPUTS}, {_OPTIONS}", 5, run=_head_forward, fake=_fake_head)
register_op(
    "linear_cross_entropy_backward",
    f"{_INPUTS}, Tensor upstream, {_OPTIONS}",
    2,
    run=_head_backward,
    fake=_fake_head_backward,
)
torch.library.register_autograd("hybridnas::linear_cross_entropy", _backpropagate, setup_context=_setup)


def linear_cross_entropy_eager(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    *,
    per_token: bool,
    z_loss: float = 0.0,
    rows: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses, the losses (N,) and the logarithms of the normalisers (N,), 0 where ignored.

    ``per_token`` says that the losses are differentiated one by one, so that no gradient of the sum is prepared.
    """
    prepare = torch.is_grad_enabled() and not per_token
    need = (prepare and x_ND.requires_grad, prepare and weight_VD.requires_grad)
    total, loss_N, logsumexp_N, _, _ = torch.ops.hybridnas.linear_cross_entropy(
        x_ND, weight_VD, targets_N, ignore_index, z_loss, *need, rows
    )
    return total, loss_N, logsumexp_N


@torch.no_grad()
def scores_eager(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, *, rows: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and normalisers (N,), and whether the likeliest token (the first of equals) is the target."""
    vocabulary, narrow, run = weight_VD.shape[0], matmul_dtype(x_ND), row_function(rows)
    with torch.autocast(x_ND.device.type, enabled=False):
        counted = _counted(targets_N, vocabulary, ignore_index, state_dtype(x_ND))
        x, weight = counted.take(x_ND).to(narrow), weight_VD.to(narrow)
        parts = []
        for part in slices(max(x.shape[0], 1), chunk_rows(vocabulary)):
            logits_TV, targets_T = x[part] @ weight.t(), counted.targets[part]
            right_T = logits_TV.argmax(1) == targets_T
            loss_T, logsumexp_T = run(logits_TV, targets_T, None, torch.empty_like(logits_TV), gradient=False)
            parts.append((loss_T, logsumexp_T, right_T))
        loss_N, logsumexp_N, right_N = (counted.put(torch.cat(p), x_ND.shape[0]) for p in zip(*parts, strict=True))
    return loss_N, logsumexp_N, right_N
