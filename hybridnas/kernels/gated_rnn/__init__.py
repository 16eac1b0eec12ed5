"""GRU and LSTM over a sequence, from any state (Cho et al. 2014, Hochreiter and Schmidhuber 1997).

Shapes: B batch, L length, D inputs, H hidden channels, G gates (3 of a GRU, 4 of an LSTM). ``reference.py`` is the
specification, ``eager.py`` is torch's own.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_tensor
from hybridnas.kernels.gated_rnn.eager import rnn_eager
from hybridnas.kernels.gated_rnn.reference import GATES, Inputs, rnn_reference

OPERATION = Operation("gated_rnn", "torch's own")
describe = OPERATION.describe
_NAME = OPERATION.name


def gated_rnn(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
    kind: str = "gru",
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return h (B, L, H) in x's dtype and the state after the last step: (h,) of a GRU, (h, c) of an LSTM, (B, H).

    x (B, L, D); weight_ih (G H, D), weight_hh (G H, H) and both biases (G H,), or none, in the order of torch's
    ``GRUCell`` (r, z, n) and ``LSTMCell`` (i, f, g, o); states in float32 whatever the inputs (float64 for float64),
    zeros where none is given. All floating inputs are differentiable. ``impl``: see ``Impl``; torch and reference.

    Raises KernelInputError for a wrong rank, shape, dtype or device, or an unknown kind, KernelUnavailableError for an
    implementation that cannot run here.
    """
    inputs = Inputs(x, weight_ih, weight_hh, bias_ih, bias_hh, initial_state, kind)
    _check(inputs)
    chosen = OPERATION.choose(impl, x.device, dtypes_of(x))
    with full_precision(x.device):
        return rnn_reference(inputs) if chosen is Impl.REFERENCE else rnn_eager(inputs)


def _check(inputs: Inputs) -> None:
    x, weight_ih, weight_hh, bias_ih, bias_hh, initial_state, kind = inputs
    if kind not in GATES:
        raise refused(_NAME, "kind", f"must be one of {', '.join(GATES)}, got {kind!r}", kind, tuple(GATES))
    require_tensor(_NAME, "x", x, "(B, L, D)", tuple(x.shape) if x.dim() == 3 else (0, 0, 0), x.device)
    batch, _, width = x.shape
    hidden = weight_hh.shape[1] if weight_hh.dim() == 2 else 0
    rows = GATES[kind] * hidden
    require_tensor(_NAME, "weight_ih", weight_ih, "(G H, D)", (rows, width), x.device)
    require_tensor(_NAME, "weight_hh", weight_hh, "(G H, H)", (rows, hidden), x.device)
    if (bias_ih is None) != (bias_hh is None):
        raise refused(_NAME, "bias_hh", "must be given where bias_ih is, and only there", bias_hh, "both or none")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            require_tensor(_NAME, name, bias, "(G H,)", (rows,), x.device)
    if initial_state is not None:
        wanted = inputs.tensors_of_state
        if len(initial_state) != wanted:
            must = f"must have {wanted} tensors for kind={kind!r}, got {len(initial_state)}"
            raise refused(_NAME, "initial_state", must, len(initial_state), wanted)
        for tensor in initial_state:
            require_tensor(_NAME, "initial_state", tensor, "(B, H)", (batch, hidden), x.device)
