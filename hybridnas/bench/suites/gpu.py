"""A GPU: kernels checked against the float64 reference and timed beside their peers, then whole models.

``python -m hybridnas.bench gpu out=gpu.json``. A form whose output or gradients are wrong is not timed. What is known
is written after every case to gpu-partial.json, so that a run cut short still tells. Peers where
installed: mamba-ssm (its scan and its state-space duality), flash-linear-attention (its convolution, its simple gated
linear attention, its gated linear recurrences; it takes the scan from mamba-ssm), torch.
Shapes: B batch, L length, D channels, N state size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.bench import peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.bench.suites import gpu_products as products
from hybridnas.bench.suites.gpu_models import measure_models
from hybridnas.errors import ConfigError, HybridNASError
from hybridnas.files import write_json
from hybridnas.kernels.causal_conv1d import causal_conv1d
from hybridnas.kernels.selective_scan import selective_scan

OURS, TORCH_SCAN, MAMBA_SSM = "ours, Triton", "ours, torch chunked", "mamba-ssm"
TORCH_CONV, FLA = "F.conv1d + silu", "flash-linear-attention"
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest error, as a part of the largest value
_Call = Callable[..., Tensor]


def run(config: BenchConfig) -> Result:
    """Measure on the first CUDA device; raises ConfigError where there is none and the suite was asked for by name.

    ``HYBRIDNAS_REHEARSE=1`` runs it on a processor at tiny shapes, with ``TRITON_INTERPRET=1`` the Triton kernels too.
    """
    result = Result("gpu")
    if not torch.cuda.is_available() and os.environ.get("HYBRIDNAS_REHEARSE") == "1":
        result.notes.append("rehearsed on a processor at shapes of no size: no figure means anything")
        impl = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"
        _all(config.replace(tiny=True), result, torch.device("cpu"), impl, None)
        return result
    if not torch.cuda.is_available():
        if config.suite != "all":
            raise ConfigError(
                "bench suite=gpu needs a CUDA device, this machine has none; suite=roofline calculates what one would "
                "need"
            )
        result.notes.append("no CUDA device here: nothing was measured")
        return result
    result.notes.append(f"device: {torch.cuda.get_device_name()}")
    _all(config, result, torch.device("cuda"), "triton", torch.cuda.synchronize)
    return result


def _all(
    config: BenchConfig, result: Result, device: torch.device, impl: str, settle: Callable[[], None] | None
) -> None:
    measure_on(config, result, device, impl, settle)
    measure_models(config, result, device, settle, lambda: _keep(config, result))


def measure_on(
    config: BenchConfig, result: Result, device: torch.device, impl: str, settle: Callable[[], None] | None
) -> None:
    """Check and time every kernel on a device."""
    scan_shapes = [(1, 16, 16, 4)] if config.tiny else [(1, 1024, 1024, 16), (8, 2048, 2048, 16)]
    for dtype in _ALLOWED:
        for shape in scan_shapes:
            case = f"scan {shape} {dtype}".replace("torch.", "")
            draw: Callable[..., list[Tensor]] = partial(_scan_inputs, device=device, dtype=dtype)
            forms = _scans(result, case, impl, device)
            _one_case(config, result, case, forms, draw, shape, (2, 70, 40, 16), partial(_scan, "reference"), settle)
        for batch, length, channels, _ in scan_shapes:
            wide = (batch, length, channels)
            case = f"conv {wide} {dtype}".replace("torch.", "")
            draw = partial(_conv_inputs, device=device, dtype=dtype)
            forms = _convs(result, case, impl, device)
            _one_case(config, result, case, forms, draw, wide, (2, 70, 40), _conv_reference, settle)
        heads = (1, 16, 2, 8, 1, 16) if config.tiny else (8, 2048, 32, 64, 1, 128)
        case = f"ssd {heads} {dtype}".replace("torch.", "")
        draw = partial(products.ssd_inputs, device=device, dtype=dtype)
        forms, small = products.ssd_forms(result, case, impl, device), (2, 70, 4, 24, 2, 40)
        _one_case(config, result, case, forms, draw, heads, small, products.ssd_by("reference"), settle)
        sizes = (1, 16, 2, 4, 8) if config.tiny else (8, 2048, 16, 128, 128)
        for variant in ("Gated DeltaNet", "Kimi delta attention", "GLA"):
            case = f"{variant} {sizes} {dtype}".replace("torch.", "")
            draw = partial(products.gated_inputs, variant=variant, device=device, dtype=dtype)
            forms, narrow = products.gated_forms(result, case, impl, device), (2, 70, 2, 24, 40)
            _one_case(config, result, case, forms, draw, sizes, narrow, products.gated_by("reference"), settle)
        for experts in [(16, 2, 8, 16)] if config.tiny else [(16384, 8, 1024, 3072), (16384, 32, 1024, 3072)]:
            case = f"moe {experts} {dtype}".replace("torch.", "")
            draw = partial(products.moe_inputs, device=device, dtype=dtype)
            forms = products.moe_forms(result, case, impl, device)
            _one_case(config, result, case, forms, draw, experts, (70, 5, 24, 40), products.moe_by("reference"), settle)


def _one_case(
    config: BenchConfig, result: Result, case: str, forms: dict[str, _Call], draw: Callable[..., list[Tensor]],
    shape: tuple[int, ...], small: tuple[int, ...], reference: _Call, settle: Callable[[], None] | None,
) -> None:  # fmt: skip
    sound = {}
    for name, call in forms.items():
        try:
            wrong = _wrong(call, reference, draw(*small))
        except (HybridNASError, RuntimeError, TypeError, ValueError, ImportError) as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"  # a peer may refuse anything
        if wrong:
            for kind in ("fwd", "fwd+bwd"):
                result.missing(f"{case} {kind}", name, wrong)
        else:
            sound[name] = call
    inputs = draw(*shape)
    upstream = torch.randn_like(inputs[0])
    for kind, work in (("fwd", _forward), ("fwd+bwd", _forward_backward)):
        timed = [Form(name, partial(work, call, inputs, upstream)) for name, call in sound.items()]
        times = measure(timed, config.pick(30, 10, 1), shortest=config.pick(0.02, 0.01, 0.0), settle=settle)
        result.add(f"{case} {kind}", times)
        for name in sound:
            if name != OURS:
                result.ratio(f"{case} {kind}", name, OURS)
    _keep(config, result)


def _keep(config: BenchConfig, result: Result) -> None:
    """Write what is known so far beside the result file, where there is to be one."""
    if (path := config.beside("-partial.json")) is not None:
        write_json(path, result.to_dict())


def _forward(call: _Call, inputs: Sequence[Tensor], _: Tensor) -> None:
    with torch.no_grad():
        call(*inputs)


def _forward_backward(call: _Call, inputs: Sequence[Tensor], upstream: Tensor) -> None:
    torch.autograd.grad(call(*inputs), inputs, upstream)


def _wrong(call: _Call, reference: _Call, inputs: list[Tensor]) -> str:
    """Return what differs from the reference in float64, output or gradient, or ''."""
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y, expected = call(*inputs), reference(*exact)
    upstream = torch.randn(y.shape)
    gradients = torch.autograd.grad(y, inputs, upstream.to(y))
    wanted = torch.autograd.grad(expected, exact, upstream.to(y.dtype).double())
    allowed = _ALLOWED[inputs[0].dtype]
    pairs = [("output", y, expected)]
    pairs += [(f"gradient {i}", g, w) for i, (g, w) in enumerate(zip(gradients, wanted, strict=True))]
    for name, got, right in pairs:
        error = float((got.detach().cpu().double() - right.detach()).abs().max() / right.detach().abs().max())
        if not error < allowed:
            return f"wrong: the {name} is off by {error:.1e} of its largest value, {allowed:g} is allowed"
    return ""


def _scan_inputs(
    batch: int, length: int, channels: int, size: int, *, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return u, delta, A, B, C, D, z, bias in our layout; A, D and bias stay float32."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    wide, narrow = (batch, length, channels), (batch, length, size)
    A_DN = -torch.arange(1.0, size + 1).repeat(channels, 1)
    given = [normal(wide), 0.1 * normal(wide), A_DN, normal(narrow), normal(narrow), torch.ones(channels)]
    given += [normal(wide), normal(channels) - 4.0]
    kept = (2, 5, 7)
    return [t.to(device, torch.float32 if i in kept else dtype).requires_grad_() for i, t in enumerate(given)]


def _scan(impl: str, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, b: Tensor) -> Tensor:
    y_BLD = selective_scan(u, dt, A, B, C, D, z, delta_bias=b, delta_softplus=True, impl=impl)
    assert isinstance(y_BLD, Tensor)
    return y_BLD


def _scans(result: Result, case: str, impl: str, device: torch.device) -> dict[str, _Call]:
    forms: dict[str, _Call] = {OURS: partial(_scan, impl), TORCH_SCAN: partial(_scan, "torch")}
    why = peers.absent("mamba_ssm") or ("" if device.type == "cuda" else "mamba-ssm needs a CUDA device")
    if why:
        result.missing(case, MAMBA_SSM, why)
    else:
        forms[MAMBA_SSM] = partial(_mamba_ssm, None)
    return forms


def _mamba_ssm(scan: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> Tensor:
    """The authors' CUDA scan; (B, D, L) and (B, N, L), as views of ours, which it copies itself."""
    scan = scan or peers.load("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    D, z, bias = rest
    turned = (t.transpose(1, 2) for t in (u, dt))
    y_BDL: Tensor = scan(
        *turned, A, B.transpose(1, 2), C.transpose(1, 2), D=D, z=z.transpose(1, 2), delta_bias=bias,
        delta_softplus=True,
    )  # fmt: skip
    return y_BDL.transpose(1, 2)


def _conv_inputs(batch: int, length: int, channels: int, *, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, channels), (channels, 4), (channels,))
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.to(device, dtype).requires_grad_() for t in given]


def _conv_reference(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    y_BLD = causal_conv1d(x_BLD, weight_DK, bias_D, activation="silu", impl="reference")
    assert isinstance(y_BLD, Tensor)
    return y_BLD


def _convs(result: Result, case: str, impl: str, device: torch.device) -> dict[str, _Call]:
    def ours(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
        y_BLD = causal_conv1d(x_BLD, weight_DK, bias_D, activation="silu", impl=impl)
        assert isinstance(y_BLD, Tensor)
        return y_BLD

    def torch_conv(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
        taps, channels = weight_DK.shape[1], weight_DK.shape[0]
        y_BDL = F.conv1d(x_BLD.transpose(1, 2), weight_DK[:, None], bias_D, padding=taps - 1, groups=channels)
        return F.silu(y_BDL[..., : x_BLD.shape[1]]).transpose(1, 2)

    forms: dict[str, _Call] = {OURS: ours, TORCH_CONV: torch_conv}
    why = peers.absent("fla") or ("" if device.type == "cuda" else "flash-linear-attention needs a CUDA device")
    if why:
        result.missing(case, FLA, why)
    else:
        forms[FLA] = _fla_conv
    return forms


def _fla_conv(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    try:
        module = peers.load("fla.modules.conv")
    except ImportError:  # before 2026
        module = peers.load("fla.modules.convolution")
    y = module.causal_conv1d(x=x_BLD, weight=weight_DK, bias=bias_D, activation="silu")
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found
