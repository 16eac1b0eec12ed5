"""One token of a block without the costs of many: Mamba through its fused kernel, where that may stand for the block.

Shapes: B batch, D d_model, I d_inner, N d_state, K d_conv. Of a parameter nothing is kept but where it lies, which is
compared at every step: weights that are replaced, moved or trained in between are seen by the next token. Hooks on the
projections, parametrisations, gradients and autocast send the token through the block's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.blocks.base import State
from hybridnas.errors import KernelInputError
from hybridnas.hardware import Impl
from hybridnas.kernels.mamba_step import check_weights, cpu
from hybridnas.kernels.mamba_step.reference import Norm, Weights

if TYPE_CHECKING:
    from hybridnas.blocks.mamba import Mamba

MAX_BATCH = 32  # the most that were measured: 1.8 to 3 times faster than torch there, and less with every sequence
_Own = dict[str, Any]


class _Layer:
    """What a prepared call was prepared from, and whether that still stands."""

    def __init__(self, block: Mamba, norm: nn.Module | None) -> None:
        self._slots: list[tuple[_Own, str, Any]] = [(block.__dict__, "impl", block.impl)]  # what hangs where
        self._hooks: list[_Own] = []
        self.plain = block.impl in (Impl.AUTO, Impl.CPU) and not block.config.inner
        into, conv, out = (self._part(block, *part) for part in _PARTS)
        select = self._part(block, "x_proj", nn.Linear) if block.x_proj is not None else {}
        step, own = cast(_Own, block.dt_proj._parameters), cast(_Own, block._parameters)
        self._slots += [(step, name, step.get(name)) for name in ("weight", "bias")]
        self._slots += [(own, name, own.get(name)) for name in ("A_log", "D", "B", "C")]
        self.norm = None if norm is None else self._norm(norm)
        values: list[Any] = [part.get(name) for part in (into, conv) for name in ("weight", "bias")]
        values += [select.get("weight"), step.get("weight"), step.get("bias")]
        values += [own.get(name) for name in ("A_log", "D", "B", "C")] + [out.get("weight"), out.get("bias")]
        self.weights = Weights(*values)
        needed = (into, conv, out)
        self.plain = self.plain and all("weight" in part for part in needed) and {"A_log", "D"} <= own.keys()
        self.plain = self.plain and "bias" in step and (block.x_proj is None or "weight" in select)
        found = self.weights if self.norm is None else (*self.weights, self.norm.weight, self.norm.bias)
        self._tensors = [t for t in found if t is not None]
        self._lay = self._lies()

    def stands(self) -> bool:
        """Whether every module, parameter and piece of memory is the one that it was, and nobody listens in."""
        for holder, name, value in self._slots:
            if holder.get(name) is not value:
                return False
        return not any(self._hooks) and self._lies() == self._lay

    def _lies(self) -> list[Any]:
        return [part for t in self._tensors for part in (t.data_ptr(), t.dtype)]

    def _part(self, block: Mamba, name: str, kind: type[nn.Module]) -> _Own:
        """Note a module of the block; returns its parameters."""
        module: Any = block._modules.get(name)
        if type(module) is not kind:
            self.plain = False
            return {}
        self._slots.append((cast(_Own, block._modules), name, module))
        self._listen(module)
        own: _Own = module._parameters
        self._slots += [(own, part, own.get(part)) for part in ("weight", "bias")]
        return own

    def _norm(self, module: nn.Module) -> Norm:
        settings: Any = module
        kind = "layernorm" if type(module) is nn.LayerNorm else "rmsnorm" if isinstance(module, nn.RMSNorm) else ""
        own = cast(_Own, module._parameters)
        if not kind or "weight" not in own or len(settings.normalized_shape) != 1:
            self.plain = False
            return Norm("layernorm", None, None, 0.0)
        self._listen(module)
        self._slots += [(own, part, own.get(part)) for part in ("weight", "bias")]
        return Norm(kind, own["weight"], own.get("bias"), settings.eps or 0.0)

    def _listen(self, module: nn.Module) -> None:
        self._hooks += [cast(_Own, module._forward_hooks), cast(_Own, module._forward_pre_hooks)]
        self.plain = self.plain and not any(self._hooks)


_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("in_proj", nn.Linear), ("conv1d", nn.Conv1d), ("out_proj", nn.Linear)
)  # fmt: skip


class FusedStep:
    """A layer's prepared call; copies and pickles of it start unprepared, since addresses are of one process."""

    def __init__(self, norm: nn.Module | None = None, residual: bool = False) -> None:
        self._norm, self._residual = norm, residual
        self._ready: tuple[_Layer, cpu.Step | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedStep, (self._norm, self._residual)

    def of(self, block: Mamba) -> cpu.Step | None:
        """Return the call for the weights of now, or None where torch must take the token."""
        ready = self._ready
        if ready is None or ready[1] is None or not ready[0].stands():
            layer = _Layer(block, self._norm)
            ready = self._ready = layer, _prepared(layer, self._residual)
        return ready[1]

    def __call__(
        self, block: Mamba, x_BLD: Tensor, conv_BKI: Tensor, ssm_BIN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the output (B, 1, D) and the next states, or None where torch must take the token."""
        if type(x_BLD) is not Tensor or not x_BLD.is_cpu or x_BLD.shape[0] > MAX_BATCH or not as_written():
            return None
        step = self.of(block)
        if step is None or not step.fits(x_BLD[:, 0], conv_BKI, ssm_BIN):
            return None
        y_BLD, conv, ssm = torch.empty_like(x_BLD), torch.empty_like(conv_BKI), torch.empty_like(ssm_BIN)
        step.bound((conv_BKI, conv), (ssm_BIN, ssm))(x_BLD, y_BLD)
        return y_BLD, conv, ssm


class InPlace:
    """``x + block(norm(x))`` for token after token, over states that it owns and overwrites."""

    def __init__(self, block: Mamba, norm: nn.Module, state: State) -> None:
        self._block, self._norm, self._state = block, norm, state
        self._fused = FusedStep(norm, residual=True)
        self._last: cpu.Step | None = None
        self._run: Callable[[Tensor, Tensor], None] | None = None

    @classmethod
    def of(cls, block: Mamba, norm: nn.Module, state: State) -> InPlace | None:
        """Take over a state, or return None where the kernel cannot take its tokens."""
        if not as_written() or state[0].shape[0] > MAX_BATCH:
            return None
        made = cls(block, norm, state)
        x_BD = state[0].new_empty(state[0].shape[0], block.config.d_model)
        return made if made._ready(x_BD) is not None else None

    def __call__(self, x_BD: Tensor) -> Tensor:
        run = self._ready(x_BD)
        if run is not None:
            run(x_BD, x_BD)
            return x_BD
        y_BLD, self._state, _ = self._block(self._norm(x_BD)[:, None], self._state)
        self._last = None  # the states lie elsewhere now
        y_BD: Tensor = y_BLD[:, 0]
        return x_BD + y_BD

    def _ready(self, x_BD: Tensor) -> Callable[[Tensor, Tensor], None] | None:
        step = self._fused.of(self._block)
        if step is None or not cpu.takes(x_BD):
            return None
        if step is not self._last:
            conv_BKI, ssm_BIN = self._state
            if not step.fits(x_BD, conv_BKI, ssm_BIN):
                return None
            self._last, self._run = step, step.bound((conv_BKI, conv_BKI), (ssm_BIN, ssm_BIN))
        return self._run


def one_row(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a norm for a few rows, whose checks would cost more than they: the same numbers, no backward."""
    if not isinstance(norm, nn.RMSNorm) or norm._forward_hooks or norm._forward_pre_hooks:
        return norm

    def run(x_BD: Tensor) -> Tensor:
        if x_BD.dtype != torch.float32:
            found: Tensor = norm(x_BD)
            return found
        return F.rms_norm(x_BD, norm.normalized_shape, norm.weight, norm.eps or 0.0)

    return run


def as_written() -> bool:
    """Whether operations run as they are written: no gradient, no autocast, nothing that traces or counts them."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )


def _readable(tensor: Tensor | None) -> bool:
    """Whether a parameter is its numbers in memory, and not a subclass that computes them."""
    return tensor is None or (type(tensor) in (nn.Parameter, Tensor) and cpu.takes(tensor))


def _prepared(layer: _Layer, residual: bool) -> cpu.Step | None:
    """Return a call for a layer's weights, or None where they lie, or fit together, otherwise than it reads them."""
    weights, norm = layer.weights, layer.norm
    tensors = weights if norm is None else (*weights, norm.weight, norm.bias)
    if not layer.plain or not all(map(_readable, tensors)) or not cpu.available():
        return None
    try:
        check_weights(weights._replace(conv=weights.conv.flatten(1)), norm)
    except KernelInputError:
        return None  # torch says what is wrong, in the terms of the operation that fails
    return cpu.Step(weights, norm, residual)
