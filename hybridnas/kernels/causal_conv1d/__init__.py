"""The causal depthwise convolution of Mamba, with SiLU, forward and backward, channel-last.

Shapes: B batch, L length, D channels, K taps. ``reference.py`` is the specification, ``eager.py`` is F.conv1d,
``native.py`` with ``conv.c`` the form on a CPU, ``triton.py`` the one on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import refused, require_seq_idx, require_tensor
from hybridnas.kernels._triton.shapes import MAX_TAPS
from hybridnas.kernels.causal_conv1d import native
from hybridnas.kernels.causal_conv1d.eager import conv_eager
from hybridnas.kernels.causal_conv1d.reference import Inputs, conv_reference

OPERATION = Operation(
    "causal_conv1d", "F.conv1d", native=native.compiled, native_available=native.available, triton=True
)
describe = OPERATION.describe
_NAME = OPERATION.name


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y (B, L, D), each channel filtered by its own K causal taps, then SiLU when ``activation='silu'``.

    x (B, L, D); weight (D, K), last tap on the present; bias (D,); states (B, K - 1, D): the inputs before x.
    ``seq_idx`` (B, L) integers: no tap reaches over a change of it. All floating inputs are differentiable. With
    ``return_final_state`` the result is (y, the last K - 1 inputs). ``impl``: see
    ``Impl``. native sums in float32, does not take float64, and takes up to 16 taps; triton float32, bfloat16, float16
    and up to 8 taps.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: the authors' ``causal_conv1d`` (arXiv 2312.00752, figure 3).
    """
    inputs = Inputs(x, weight, bias, activation, initial_state, seq_idx)
    _check(inputs)
    taps = weight.shape[1]
    chosen = OPERATION.choose(
        impl,
        x.device,
        dtypes_of(x, weight, bias, initial_state),
        native_limit=f"takes at most {native.MAX_TAPS} taps K, got {taps}" if taps > native.MAX_TAPS else "",
        triton_limit=f"takes at most {MAX_TAPS} taps K, got {taps}" if taps > MAX_TAPS else "",
    )
    if chosen is Impl.NATIVE:
        y_BLD, final_BKD = native.conv_native(inputs)
    elif chosen is Impl.TRITON:
        from hybridnas.kernels.causal_conv1d.triton import conv_triton

        y_BLD, final_BKD = conv_triton(inputs)
    else:
        y_BLD, final_BKD = conv_reference(inputs) if chosen is Impl.REFERENCE else conv_eager(inputs)
    return (y_BLD, final_BKD) if return_final_state else y_BLD


def _check(inputs: Inputs) -> None:
    x, weight, bias, activation, initial_state, seq_idx = inputs
    device = x.device
    require_tensor(_NAME, "x", x, "(B, L, D)", tuple(x.shape) if x.dim() == 3 else (0, 0, 0), device)
    batch, length, channels = x.shape
    taps = weight.shape[1] if weight.dim() == 2 else 0
    require_tensor(_NAME, "weight", weight, "(D, K)", (channels, taps), device)
    if taps < 1:
        raise refused(
            _NAME,
            "weight",
            f"must have at least one tap (D, K), got shape {tuple(weight.shape)}",
            tuple(weight.shape),
            "K >= 1",
        )
    if bias is not None:
        require_tensor(_NAME, "bias", bias, "(D,)", (channels,), device)
    if activation not in (None, "silu"):
        raise refused(_NAME, "activation", f"must be None or 'silu', got {activation!r}", activation, [None, "silu"])
    if initial_state is not None:
        require_tensor(_NAME, "initial_state", initial_state, "(B, K - 1, D)", (batch, taps - 1, channels), device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), device)
