"""A diagonal, time-invariant state space of each channel, as in S4D (arXiv 2206.11893): convolution and recurrence.

Shapes: B batch, L length, D channels, N states of a channel. ``reference.py`` is the specification, ``eager.py`` the
convolution by FFT, with powers of the decays in front of and behind it.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_seq_idx, require_tensor
from hybridnas.kernels.diagonal_ssm.eager import ssm_eager
from hybridnas.kernels.diagonal_ssm.reference import Inputs, ssm_reference

OPERATION = Operation("diagonal_ssm", "a convolution by FFT, and one step for one token")
describe = OPERATION.describe
_NAME = OPERATION.name


def diagonal_ssm(
    u: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y (B, L, D) of h_t = exp(log_decay) h_{t-1} + u_t, y_t = Re(sum over N of weight h_t), in u's dtype.

    u (B, L, D) real; log_decay, weight (D, N) and states (B, D, N), all real or all complex, of at least float32 or
    complex64. ``seq_idx`` (B, L) integers: the state restarts from zero where it changes along L. All floating inputs
    are differentiable. With ``return_final_state`` the result is (y, the state after the last step). ``impl``: see
    ``Impl``; torch and reference. Source: Gu, Gupta, Goel and Ré 2022, equations 2 to 6.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation that
    cannot run here.
    """
    inputs = Inputs(u, log_decay, weight, initial_state, seq_idx)
    _check(inputs)
    chosen = OPERATION.choose(impl, u.device, dtypes_of(u))
    with full_precision(u.device):
        if chosen is Impl.REFERENCE:
            y_BLD, final_BDN = ssm_reference(inputs)
        else:
            y_BLD, final_BDN = ssm_eager(inputs, with_state=return_final_state)
    return (y_BLD, final_BDN) if return_final_state else y_BLD


def _check(inputs: Inputs) -> None:
    u, log_decay, weight, initial_state, seq_idx = inputs
    require_tensor(_NAME, "u", u, "(B, L, D)", tuple(u.shape) if u.dim() == 3 else (0, 0, 0), u.device)
    batch, length, channels = u.shape
    size = log_decay.shape[1] if log_decay.dim() == 2 else 0
    given: list[tuple[str, Tensor, str, tuple[int, ...]]] = [
        ("log_decay", log_decay, "(D, N)", (channels, size)),
        ("weight", weight, "(D, N)", (channels, size)),
    ]
    if initial_state is not None:
        given.append(("initial_state", initial_state, "(B, D, N)", (batch, channels, size)))
    for name, tensor, letters, shape in given:
        real = tensor.real if tensor.is_complex() else tensor
        require_tensor(_NAME, name, real, letters, shape, u.device)
        if tensor.is_complex() != log_decay.is_complex():
            kind = "complex" if log_decay.is_complex() else "real"
            raise refused(_NAME, name, f"must be {kind} like log_decay, got {tensor.dtype}", tensor.dtype, kind)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), u.device)
