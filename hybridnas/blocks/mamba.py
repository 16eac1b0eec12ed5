"""Mamba block, letter M: gated selective state space (Gu and Dao 2023), its projections optionally routed experts.

Shapes: B batch, L length, D d_model, I d_inner, R dt_rank, N d_state, K d_conv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError, suggest
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.kernels import mamba_step as step_kernel
from hybridnas.kernels import moe_dispatch as moe_kernel
from hybridnas.kernels import selective_scan as scan_kernel
from hybridnas.kernels.mamba_step import native as native_step
from hybridnas.kernels.mamba_step.reference import Weights
from hybridnas.layers.block import NO_AUX, Aux, Block, BlockConfig, BlockOutput, State, Variant, exportable
from hybridnas.layers.experts import RoutedExperts, RoutedShape
from hybridnas.layers.mode import has_hooks, is_plain_eager
from hybridnas.layers.norms import RMSNorm
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.layers.split_linear import split_linear
from hybridnas.layers.step import readable, run_in_place, step_norm
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_SELECTIVE = ("dt", "B", "C")
_INNER = ("conv", "gate", "out")
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the step sizes at initialisation


def scan_flops(d_inner: int, d_state: int) -> int:
    """Return FLOPs of the scan for one token.

    Per channel and state 7 (delta A, exp, (delta u) B, decay h, +, C h, +); per channel 7 (+ bias, softplus, delta u,
    D u, +, silu z, gate).
    """
    return 7 * d_inner * (d_state + 1)


def conv_flops(d_inner: int, d_conv: int) -> int:
    """Return FLOPs of the depthwise convolution for one token."""
    return 2 * d_conv * d_inner


@exportable
class MambaState(NamedTuple):
    """The last K - 1 inputs of the convolution, and the state of the scan, always float32."""

    conv_BKI: Tensor
    ssm_BIN: Tensor


@register_block("M", name="mamba")
class Mamba(Block):
    """Selective state space with Euler B, D skip and z gate, as the authors' code computes it (arXiv 2312.00752).

    Parameter names and layouts are those of ``mamba_ssm`` and of transformers' MambaMixer and JambaMambaMixer.
    """

    outputs = ("out_proj", "inner.out.experts.down_proj")
    float32 = ("A_log", "D", "B", "C", "dt_proj.bias", *(f"inner.{part}.router.weight" for part in _INNER))
    no_decay = ("A_log", "D")

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the Mamba block."""

        d_state: int = option(16, "state size N per channel [count]", ge=1)
        d_conv: int = option(4, "taps of the causal convolution [tokens]", ge=1)
        expand: float = option(2.0, "d_inner as a multiple of d_model, where d_inner is none", gt=0)
        d_inner: int | None = option(None, "inner width; none: round(expand * d_model) [channels]", ge=1)
        dt_rank: int | None = option(None, "rank of the step-size projection; none: ceil(d_model / 16) [count]", ge=1)
        conv_bias: bool = option(True, "bias of the convolution")
        bias: bool = option(False, "biases of the input and output projections")
        selective: str | bool = option(
            "dt+B+C", "which of dt, B, C depend on the input, joined by '+'; none or false: constants; true: all three"
        )
        selective_norm: str = option(
            "none",
            "RMSNorm of what is computed from the input for dt, B and C, each by itself: none, scaled by weights "
            "(Jamba), unscaled (Falcon-Mamba)",
            choices=("none", "scaled", "unscaled"),
        )
        selective_norm_eps: float = option(1e-6, "epsilon of these norms", gt=0)
        inner_moe: str = option("none", "which projections are routed experts: conv, gate, out, joined by '+'; none")
        inner_experts: int = option(8, "routed experts of each such projection [count]", ge=1)
        inner_d_expert: int | None = option(
            None, "hidden width of one such expert; none: as many weights as the projection replaced [channels]", ge=1
        )
        inner_capacity_factor: float | None = option(
            1.0, "slots of such an expert in training, in units of tokens / experts; none: drop no token", gt=0
        )
        inner_load_balance_weight: float = option(0.01, "weight of the loss n_experts * sum(f_i * P_i)", ge=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            _parts(self.selective, _SELECTIVE, self.label(), "selective")
            _parts(self.inner_moe, _INNER, self.label(), "inner_moe")
            if self.width < 1:
                raise ConfigError(
                    f"{self.label()} expand={self.expand} of d_model={self.d_model} leaves no inner channel; "
                    f"use a larger expand, or give d_inner",
                    field="expand",
                    got=self.expand,
                    allowed=f">= {1 / self.d_model:.4g}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else round(self.expand * self.d_model)

        @property
        def rank(self) -> int:
            """Return dt_rank with its default resolved."""
            return self.dt_rank if self.dt_rank is not None else _default_rank(self.d_model)

        @property
        def selected(self) -> tuple[str, ...]:
            """Return which of dt, B, C depend on the input."""
            return _parts(self.selective, _SELECTIVE, self.label(), "selective")

        @property
        def inner(self) -> tuple[str, ...]:
            """Return which of the conv, gate and out projections are routed experts."""
            return _parts(self.inner_moe, _INNER, self.label(), "inner_moe")

        @property
        def normed(self) -> bool:
            """Return whether any of dt, B, C passes a norm."""
            return self.selective_norm != "none" and bool(self.selected)

        @property
        def x_proj_sizes(self) -> list[int]:
            """Return the widths of the parts computed from the input: those selected of dt (rank), B, C (state)."""
            return [self.rank if part == "dt" else self.d_state for part in self.selected]

        def inner_shape(self, part: str) -> RoutedShape:
            """Return the routed layer that stands for one projection."""
            d_in, d_out = (self.width, self.d_model) if part == "out" else (self.d_model, self.width)
            same = max(1, round(d_in * d_out / (d_in + d_out)))
            return RoutedShape(
                d_in=d_in,
                d_out=d_out,
                n_experts=self.inner_experts,
                d_expert=self.inner_d_expert if self.inner_d_expert is not None else same,
                capacity_factor=self.inner_capacity_factor,
                load_balance_weight=self.inner_load_balance_weight,
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, n = self.d_model, self.width, self.d_state
            dense = [part for part in _INNER if part not in self.inner]
            matrices = len(dense) * d * di + di * sum(self.x_proj_sizes)
            matrices += self.rank * di if "dt" in self.selected else 0
            biases = sum(d if part == "out" else di for part in dense) if self.bias else 0
            conv = di * self.d_conv + (di if self.conv_bias else 0)
            constants = n * sum(part not in self.selected for part in ("B", "C"))
            params = matrices + biases + conv + constants + di + di * n + di  # dt bias, A, D
            params += sum(self.x_proj_sizes) if self.selective_norm == "scaled" else 0
            flops = 2.0 * matrices + conv_flops(di, self.d_conv) + scan_flops(di, n)
            state = (self.d_conv - 1) * di * dtype_bytes + di * n * 4
            total = Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)
            return sum((self.inner_shape(part).cost() for part in self.inner), start=total)

        def kernel_flops(self) -> dict[str, float]:
            scan, conv = scan_flops(self.width, self.d_state), conv_flops(self.width, self.d_conv)
            return {"selective_scan": scan, "causal_conv1d": conv}

        def canonical(self) -> dict[str, Any]:
            fields = {**self.to_dict(), "d_inner": self.width, "dt_rank": self.rank}
            fields |= {"selective": "+".join(self.selected) or "none", "inner_moe": "+".join(self.inner) or "none"}
            fields["inner_d_expert"] = self.inner_shape("conv").d_expert
            idle = {"expand"} if "dt" in self.selected else {"expand", "dt_rank"}
            if not self.normed:
                idle |= {"selective_norm", "selective_norm_eps"}
            idle |= {name for name in fields if name.startswith("inner_") and name != "inner_moe" and not self.inner}
            return {name: value for name, value in fields.items() if name not in idle}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, n = config.d_model, config.width, config.d_state
        self._halves = [part for part in ("conv", "gate") if part not in config.inner]
        self.in_proj = nn.Linear(d, di * len(self._halves), bias=config.bias) if self._halves else None
        self.conv1d = ShortConvolution(di, config.d_conv, bias=config.conv_bias, impl=impl)
        self.x_proj = nn.Linear(di, sum(config.x_proj_sizes), bias=False) if config.selected else None
        norms: dict[str, RMSNorm | None] = dict.fromkeys(_SELECTIVE)
        if config.selective_norm != "none":
            scaled = config.selective_norm == "scaled"
            for part, size in zip(config.selected, config.x_proj_sizes, strict=True):
                norms[part] = RMSNorm(size, config.selective_norm_eps, scaled=scaled, impl=impl)
        # named as in transformers' JambaMambaMixer
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = (norms[part] for part in _SELECTIVE)
        self.dt_proj = _StepProjection(config.rank if "dt" in config.selected else 0, di)
        self.A_log = nn.Parameter(torch.empty(di, n))
        self.D = nn.Parameter(torch.empty(di))
        self.B = None if "B" in config.selected else nn.Parameter(torch.empty(n))
        self.C = None if "C" in config.selected else nn.Parameter(torch.empty(n))
        self.out_proj = None if "out" in config.inner else nn.Linear(di, d, bias=config.bias)
        self.inner = nn.ModuleDict({part: RoutedExperts(config.inner_shape(part), impl=impl) for part in config.inner})
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"expand": 4 / 3, "d_state": 4, "bias": True}),
            Variant(fields={"d_inner": 20, "dt_rank": 3, "d_conv": 1, "conv_bias": False}),
            Variant(fields={"selective": "none"}),
            Variant(fields={"selective": "B+C"}),
            Variant(fields={"selective": "dt"}),
            Variant(fields={"selective_norm": "scaled", "selective_norm_eps": 1e-3}),
            Variant(fields={"selective_norm": "unscaled", "selective": "dt+C"}),
            Variant(fields={"inner_moe": "gate", "inner_experts": 3}),
            Variant(fields={"inner_moe": "conv+gate+out", "inner_experts": 2, "inner_d_expert": 12, "bias": True}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        auxes: dict[str, Aux] = {}
        u_BLI, z_BLI = self._project_in(x_BLD, auxes)
        before = None if state is None else cast(MambaState, state)
        u_BLI, conv_BKI = self.conv1d(u_BLI, None if before is None else before.conv_BKI, segments_BL)
        y_BLI, ssm_BIN = self._scan(u_BLI, z_BLI, before, segments_BL)
        if self.out_proj is not None:
            y_BLD = self.out_proj(y_BLI)
        else:
            y_BLD, auxes["out"] = self.inner["out"](y_BLI)
        after = None if conv_BKI is None or ssm_BIN is None else MambaState(conv_BKI, ssm_BIN)
        return BlockOutput(y_BLD, after, _merge(auxes))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        config: Mamba.Config = self.config
        return MambaState(
            self.conv1d.init_state(batch_size, device=device, dtype=dtype),
            torch.zeros(batch_size, config.width, config.d_state, device=device, dtype=torch.float32),
        )

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        """Run the whole layer as one call of ``kernels.mamba_step``; None where that could not stand for it.

        The kernel reads float32 on a processor, and weights as they lie now: of modules with hooks, parametrizations
        or other classes it knows nothing. A norm of another kind runs before it.
        """
        weights, norms = self._step_weights(), step_norm(norm)
        if weights is None or norms is None or not is_plain_eager(weights.in_proj.device):
            return None
        tensors = (*weights, *norms.tensors)
        if not readable(tensors) or not native_step.available():
            return None
        step = native_step.Step(weights, norms.inside, residual=norms.outside is None)
        return run_in_place(step, tensors, state, self.config.d_model, norms.outside)

    def _step_weights(self) -> Weights | None:
        """Return the parameters as ``mamba_step`` takes them, or None where the block is not theirs alone."""
        parts = [part for part in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj) if part]
        known = (nn.Linear, ShortConvolution, _StepProjection)
        plain = all(type(part) in known and not has_hooks(part) for part in parts)
        if not plain or self.in_proj is None or self.out_proj is None or self.config.inner:
            return None
        if self.config.normed:  # the kernel has no norms of dt, B and C
            return None
        if type(self).forward is not Mamba.forward or (self.impl is not Impl.AUTO and self.impl is not Impl.NATIVE):
            return None
        return Weights(
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight,
            self.conv1d.bias,
            None if self.x_proj is None else self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            self.B,
            self.C,
            self.out_proj.weight,
            self.out_proj.bias,
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw the authors' initialisation: plain PyTorch linears, S4D-real A; init_scale is for inner experts."""
        norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        for module in (self.in_proj, self.conv1d, self.x_proj, *norms, self.dt_proj, self.out_proj):
            if module is not None:
                module.reset_parameters()
        with torch.no_grad():
            n = torch.arange(1, self.config.d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(n.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            if self.B is not None:
                self.B.fill_(1.0)  # constants as in S4D (Gu 2022): B ones, C normal
            if self.C is not None:
                self.C.normal_()
        for routed in self.inner.values():
            cast(RoutedExperts, routed).reset_parameters(init_scale)

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of the step size's projection, whose fan-in is the rank."""
        config: Mamba.Config = self.config
        if self.dt_proj.weight is None:
            return {}
        grows = config.dt_rank is None
        return {"dt_proj.weight": matrix(config.rank / _default_rank(base_width) if grows else 1.0)}

    def implementations(self, device: torch.device) -> dict[str, str]:
        operations = [scan_kernel.OPERATION, conv_kernel.OPERATION]
        if self.config.inner:
            operations.append(moe_kernel.OPERATION)
        elif not self.config.normed:
            operations.append(step_kernel.OPERATION)
        return {op.name: op.describe(device, impl=op.nearest(self.impl)) for op in operations}

    def _project_in(self, x_BLD: Tensor, auxes: dict[str, Aux]) -> tuple[Tensor, Tensor]:
        widths = [self.config.width] * len(self._halves)
        parts = () if self.in_proj is None else split_linear(self.in_proj, x_BLD, widths)
        found = dict(zip(self._halves, parts, strict=True))
        for part in ("conv", "gate"):
            if part not in found:
                found[part], auxes[part] = self.inner[part](x_BLD)
        return found["conv"], found["gate"]

    def _scan(
        self, u_BLI: Tensor, z_BLI: Tensor, before: MambaState | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        delta_BLI, B_BLN, C_BLN = self._select(u_BLI)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        A_IN, D_I, bias_I = -self.A_log.to(wide).exp(), self.D.to(wide), self.dt_proj.bias.to(wide)
        if before is not None and u_BLI.shape[1] == 1:
            u_BI, delta_BI, B_BN, C_BN, z_BI = (part[:, 0] for part in (u_BLI, delta_BLI, B_BLN, C_BLN, z_BLI))
            y_BI, ssm_BIN = scan_kernel.selective_state_update(
                before.ssm_BIN,
                u_BI,
                delta_BI,
                A_IN,
                B_BN,
                C_BN,
                D_I,
                z_BI,
                delta_bias=bias_I,
                delta_softplus=True,
                impl=self.impl,
            )
            return y_BI[:, None], ssm_BIN
        scanned = scan_kernel.selective_scan(
            u_BLI,
            delta_BLI,
            A_IN,
            B_BLN,
            C_BLN,
            D_I,
            z_BLI,
            delta_bias=bias_I,
            delta_softplus=True,
            initial_state=None if before is None else before.ssm_BIN,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=self.impl,
        )
        return scanned if isinstance(scanned, tuple) else (scanned, None)

    def _select(self, u_BLI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return delta before bias and softplus, B and C: from the input where selective, else constants."""
        config: Mamba.Config = self.config
        parts = self.x_proj(u_BLI).split(config.x_proj_sizes, dim=-1) if self.x_proj is not None else ()
        found = dict(zip(config.selected, parts, strict=True))
        for part, norm in zip(_SELECTIVE, (self.dt_layernorm, self.b_layernorm, self.c_layernorm), strict=True):
            if norm is not None:
                found[part] = norm(found[part])
        shape = u_BLI.shape[:2]
        if self.B is not None:
            found["B"] = self.B.to(u_BLI.dtype).expand(*shape, -1)
        if self.C is not None:
            found["C"] = self.C.to(u_BLI.dtype).expand(*shape, -1)
        if self.dt_proj.weight is None:
            return u_BLI.new_zeros(()).expand_as(u_BLI), found["B"], found["C"]
        return F.linear(found["dt"], self.dt_proj.weight), found["B"], found["C"]


class _StepProjection(nn.Module):
    """Weight (I, R) and bias (I,) of the step size; the bias alone where the step does not depend on the input."""

    def __init__(self, rank: int, d_inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, rank)) if rank else None
        self.bias = nn.Parameter(torch.empty(d_inner))

    def reset_parameters(self) -> None:
        """Draw steps log-uniform in [1e-3, 1e-1] through the bias, the weight uniform within rank ** -0.5."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.uniform_(-(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)
            low, high = math.log(_DT_MIN), math.log(_DT_MAX)
            dt_I = torch.rand_like(self.bias, dtype=torch.float32).mul_(high - low).add_(low).exp_().clamp_(_DT_FLOOR)
            self.bias.copy_(dt_I + torch.log(-torch.expm1(-dt_I)))  # the inverse of softplus


def _default_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)


def _parts(text: str | bool, allowed: tuple[str, ...], label: str, field: str) -> tuple[str, ...]:
    """Split 'a+b' into names in their canonical order; raises ConfigError for unknown and repeated ones."""
    if text in (True, "true"):
        return allowed
    if text in (False, "false", "none"):
        return ()
    assert isinstance(text, str)
    names = text.split("+")
    for name in names:
        if name not in allowed:
            problem = f"has unknown part {name!r}{suggest(name, allowed)}"
        elif names.count(name) > 1:
            problem = f"names {name!r} twice"
        else:
            continue
        raise ConfigError(
            f"{label} {field}={text!r} {problem} (join {', '.join(allowed)} by '+', each once, or write 'none')",
            field=field,
            got=text,
            allowed=allowed,
        )
    return tuple(name for name in allowed if name in names)


def _merge(auxes: dict[str, Aux]) -> Aux:
    """Average the losses of the routed projections (so that one layer weighs as one), prefix their statistics."""
    if not auxes:
        return NO_AUX
    names = dict.fromkeys(name for aux in auxes.values() for name in aux.losses)
    losses = {n: torch.stack([aux.losses[n] for aux in auxes.values()]).mean() for n in names}
    stats = {f"{part}.{name}": value for part, aux in auxes.items() for name, value in aux.stats.items()}
    return Aux(losses, stats)
