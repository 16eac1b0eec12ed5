"""What the blocks on ``kernels.gated_delta`` share: projections, short convolution, state, output norm and gate.

Shapes: B batch, L length, D d_model, G key heads, H value heads, K key channels and V value channels of a head,
C channels of the convolution, T taps, I = H V.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.kernels import delta_step as step_kernel
from hybridnas.kernels import gated_delta as delta_kernel
from hybridnas.kernels.delta_step import native as native_step
from hybridnas.kernels.delta_step.reference import Form, Weights
from hybridnas.kernels.rmsnorm import OPERATION as NORM_OPERATION
from hybridnas.kernels.rmsnorm import rms_norm
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, exportable
from hybridnas.layers.mode import has_hooks, is_plain_eager
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.layers.split_linear import split_linear
from hybridnas.layers.step import readable, run_in_place, step_norm

L2_EPS = 1e-6  # of the published code, added to the sum of squares
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the step sizes at initialisation, as in Mamba


@exportable
class RecurrenceState(NamedTuple):
    """The last T - 1 inputs of the convolution (none without one), and the matrix of each head, always float32."""

    conv_BTC: Tensor
    memory_BHKV: Tensor


@dataclass(frozen=True, kw_only=True)
class RecurrenceShape:
    """The sizes of a block, all resolved. The rows of ``in_proj`` are: ``mixed``, gate, decay, beta."""

    d_model: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    mixed: int  # channels that pass the convolution: queries, keys and values
    decay_in: int = 0  # columns of in_proj that the decay is made of
    has_decay: bool = True
    delta: bool = True
    taps: int = 4  # 0: no convolution
    conv_bias: bool = False
    silu: bool = True  # whether SiLU follows in_proj where there is no convolution, which has its own
    gate: str = "silu"  # or sigmoid, or none
    gate_rank: int = 0  # inner width of a gate of two matrices; 0: one matrix
    norm: str = "head"  # RMSNorm of each head's output, of the whole width, "sum" (of the keys' weights), or none
    norm_eps: float = 1e-5

    @property
    def inner(self) -> int:
        """Width of the output of all heads [channels]."""
        return self.value_heads * self.value_dim

    @property
    def memory_dim(self) -> int:
        """Columns of a head's state: the values, and one more where the output is divided by the keys' sum."""
        return self.value_dim + (self.norm == "sum")

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """What ``in_proj`` yields for convolution, gate, decay and beta [channels]."""
        gate = 0 if self.gate == "none" else self.gate_rank or self.inner
        return self.mixed, gate, self.decay_in, self.value_heads if self.delta else 0

    @property
    def norm_width(self) -> int:
        """Weights of the output norm [count]."""
        return {"head": self.value_dim, "whole": self.inner}.get(self.norm, 0)

    def form(self, **own: Any) -> Form:
        """Return what ``kernels.delta_step`` takes, the recurrence's own fields given."""
        return Form(
            key_heads=self.key_heads,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            columns=self.columns,
            l2_eps=L2_EPS,
            norm=self.norm,
            norm_eps=self.norm_eps,
            gate=self.gate,
            **{"scale": self.key_dim**-0.5, "silu": self.mixed if self.silu else 0, **own},
        )

    def flops(self) -> dict[str, float]:
        """Return kernel -> FLOPs of one token; the recurrence with output norm and gate.

        Per entry of the state 4 (k v, +, q S, +), 1 more with a decay, 2 more with the delta term (k S, +); per value
        channel 2 with the delta term (v - k S, beta), 4 of the norm, 2 of the gate.
        """
        entry = 4 + self.has_decay + 2 * self.delta
        channel = 2 * self.delta + 4 * (self.norm != "none") + 2 * (self.gate != "none")
        per_head = self.key_dim * self.memory_dim * entry + self.value_dim * channel
        conv = {"causal_conv1d": 2.0 * self.taps * self.mixed} if self.taps else {}
        return {"gated_delta": float(self.value_heads * per_head), **conv}

    def cost(self, dtype_bytes: int, *, matrices: int = 0, vectors: int = 0) -> Cost:
        """Return the cost; ``matrices`` and ``vectors`` count the weights of the block's own besides those here."""
        matrices += self.d_model * (sum(self.columns) + self.inner) + self.gate_rank * self.inner
        conv = self.mixed * (self.taps + self.conv_bias) if self.taps else 0
        params = matrices + vectors + conv + self.norm_width
        memory = self.value_heads * self.key_dim * self.memory_dim
        return Cost(
            params=params,
            active_params=params,
            flops_per_token=2.0 * matrices + sum(self.flops().values()),
            state_bytes=max(0, self.taps - 1) * self.mixed * dtype_bytes + memory * 4,
        )


class RecurrenceConfig(BlockConfig):
    """A config whose sizes are a :class:`RecurrenceShape`."""

    state_sizes = ("head_dim",)

    @property
    def shape(self) -> RecurrenceShape:
        """Return the sizes with all defaults resolved."""
        raise NotImplementedError

    def kernel_flops(self) -> dict[str, float]:
        return self.shape.flops()


class OutputNorm(nn.Module):
    """weight * rmsnorm(y) over ``group`` channels at a time, times act(gate), both where there is one."""

    def __init__(self, group: int, eps: float, gate: str, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.impl = NORM_OPERATION.nearest(impl)
        self.weight = nn.Parameter(torch.ones(group)) if group else None
        self.eps, self.gate = eps, gate

    def forward(self, y_BLHV: Tensor, gate_BLI: Tensor | None) -> Tensor:
        """Return (B, L, I)."""
        y_BLI = y_BLHV.flatten(-2)
        if self.weight is not None:
            groups = torch.unflatten(y_BLI, -1, (-1, self.weight.shape[0]))
            y_BLI = rms_norm(groups, self.weight, self.eps, impl=self.impl).flatten(-2)
        if gate_BLI is None:
            return y_BLI
        return y_BLI * (F.silu(gate_BLI) if self.gate == "silu" else gate_BLI.sigmoid())


class LinearRecurrence(Block):
    """A block around ``kernels.gated_delta``; subclasses make queries, keys, values and decays of the projections."""

    def __init__(self, config: RecurrenceConfig, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        shape = self.shape = config.shape
        self.in_proj = nn.Linear(shape.d_model, sum(shape.columns), bias=False)
        self.conv1d = ShortConvolution(shape.mixed, shape.taps, bias=shape.conv_bias, impl=impl) if shape.taps else None
        self.gate_proj = nn.Linear(shape.gate_rank, shape.inner, bias=False) if shape.gate_rank else None
        self.norm = OutputNorm(shape.norm_width, shape.norm_eps, shape.gate, impl=impl)
        self.out_proj = nn.Linear(shape.inner, shape.d_model, bias=False)

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        before = None if state is None else cast(RecurrenceState, state)
        mixed, gate, decay, beta = self.shape.columns
        u_BLC, gate_BLI, rest_BLY = split_linear(self.in_proj, x_BLD, (mixed, gate, decay + beta))
        decay_BLX, beta_BLH = torch.split(rest_BLY, [decay, beta], dim=-1)
        if self.gate_proj is not None:
            gate_BLI = self.gate_proj(gate_BLI)
        conv_BTC = None if before is None else before.conv_BTC
        if self.conv1d is not None:
            u_BLC, conv_BTC = self.conv1d(u_BLC, conv_BTC, segments_BL)
        elif self.shape.silu:
            u_BLC = F.silu(u_BLC)
        y_BLHV, memory_BHKV = self.recur(
            u_BLC,
            decay_BLX,
            beta_BLH.sigmoid() if self.shape.delta else None,
            None if before is None else before.memory_BHKV,
            segments_BL,
        )
        y_BLD = self.out_proj(self.norm(y_BLHV, None if self.shape.gate == "none" else gate_BLI))
        if conv_BTC is None or memory_BHKV is None:
            return BlockOutput(y_BLD, None)
        return BlockOutput(y_BLD, RecurrenceState(conv_BTC, memory_BHKV))

    @abstractmethod
    def recur(
        self,
        u_BLC: Tensor,
        decay_BLX: Tensor,
        beta_BLH: Tensor | None,
        memory_BHKV: Tensor | None,
        segments_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is read at each step (B, L, H, V), and the next memory where one was given."""

    def heads_of(self, u_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (B, L, G, K) and values (B, L, H, V)."""
        shape = self.shape
        keys = shape.key_heads * shape.key_dim
        q_BLX, k_BLX, v_BLX = torch.split(u_BLC, [keys, keys, shape.inner], dim=-1)
        q_BLGK, k_BLGK = (torch.unflatten(part, -1, (shape.key_heads, shape.key_dim)) for part in (q_BLX, k_BLX))
        return q_BLGK, k_BLGK, torch.unflatten(v_BLX, -1, (shape.value_heads, shape.value_dim))

    def unit(self, x_BLGK: Tensor) -> Tensor:
        """Return x / sqrt(sum(x^2) + 1e-6) over the last dimension, as an RMSNorm whose weights are K ** -0.5."""
        size, wide = x_BLGK.shape[-1], torch.promote_types(x_BLGK.dtype, torch.float32)
        weight_K = x_BLGK.new_full((size,), size**-0.5, dtype=wide)
        return rms_norm(x_BLGK, weight_K, L2_EPS / size, impl=self.norm.impl)

    def run(
        self,
        q_BLGK: Tensor,
        k_BLGK: Tensor,
        v_BLHV: Tensor,
        log_decay: Tensor | None,
        beta_BLH: Tensor | None,
        memory_BHKV: Tensor | None,
        segments_BL: Tensor | None,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Call the kernel."""
        found = delta_kernel.gated_delta(
            q_BLGK,
            k_BLGK,
            v_BLHV,
            log_decay,
            beta_BLH,
            scale=scale,
            initial_state=memory_BHKV,
            return_final_state=memory_BHKV is not None,
            seq_idx=segments_BL,
            impl=delta_kernel.OPERATION.nearest(self.impl),
        )
        return found if isinstance(found, tuple) else (found, None)

    @abstractmethod
    def step(self) -> tuple[Weights, Form]:
        """Return the block as ``kernels.delta_step`` takes it, for decoding."""

    def weights(self, **own: Tensor | None) -> Weights:
        """Return the parameters as ``delta_step`` takes them, those of the subclass given."""
        conv, gate = self.conv1d, self.gate_proj
        given = {name: own.get(name) for name in ("decay_proj", "decay_bias", "A_log", "dt_bias", "frequency")}
        return Weights(
            in_proj=self.in_proj.weight,
            conv=None if conv is None else conv.weight.squeeze(1),
            conv_bias=None if conv is None else conv.bias,
            gate_proj=None if gate is None else gate.weight,
            norm=self.norm.weight,
            out_proj=self.out_proj.weight,
            **given,
        )

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        """Run the whole layer as one call of ``kernels.delta_step``; None where that could not stand for it.

        A norm of a kind that the kernel does not know runs before it.
        """
        norms, parts = step_norm(norm), [part for part in self.children() if part is not None]
        plain = all(type(part) in (nn.Linear, ShortConvolution, OutputNorm) and not has_hooks(part) for part in parts)
        if norms is None or not plain or type(self).forward is not LinearRecurrence.forward:
            return None
        if self.impl not in (Impl.AUTO, Impl.NATIVE) or not is_plain_eager(self.in_proj.weight.device):
            return None
        weights, form = self.step()
        tensors = (*weights, *norms.tensors)
        if not readable(tensors) or not native_step.available():
            return None
        step = native_step.Step(weights, form, norms.inside, residual=norms.outside is None)
        return run_in_place(step, tensors, state, self.shape.d_model, norms.outside)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        shape = self.shape
        memory = (batch_size, shape.value_heads, shape.key_dim, shape.memory_dim)
        return RecurrenceState(
            torch.zeros(batch_size, max(0, shape.taps - 1), shape.mixed, device=device, dtype=dtype),
            torch.zeros(memory, device=device, dtype=torch.float32),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw plain PyTorch linears and a norm of ones; init_scale is not used."""
        for module in (self.in_proj, self.conv1d, self.gate_proj, self.out_proj):
            if module is not None:
                module.reset_parameters()
        if self.norm.weight is not None:
            nn.init.ones_(self.norm.weight)

    def implementations(self, device: torch.device) -> dict[str, str]:
        conv = [conv_kernel.OPERATION] if self.shape.taps else []
        operations = [delta_kernel.OPERATION, *conv, step_kernel.OPERATION]
        return {op.name: op.describe(device, impl=op.nearest(self.impl)) for op in operations}


def softplus_decay(raw: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return the logarithms of decays, -exp(A_log) softplus(raw + dt_bias), in float32 or wider."""
    wide = torch.promote_types(A_log.dtype, torch.float32)
    return -A_log.to(wide).exp() * F.softplus(raw.to(wide) + dt_bias.to(wide))


def draw_dt_bias_(dt_bias: Tensor) -> None:
    """Fill with the inverse softplus of steps drawn log-uniform in [1e-3, 1e-1], as Mamba's authors do."""
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = torch.rand_like(dt_bias, dtype=torch.float32).mul_(high - low).add_(low).exp_().clamp_(_DT_FLOOR)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most ``limit``."""
    return next(k for k in range(min(number, limit), 0, -1) if number % k == 0)
