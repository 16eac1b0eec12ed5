"""Which implementation of an operation runs on which device, and how a named one is refused."""

import pytest
import torch

import hybridnas
from hybridnas.errors import ConfigError, KernelUnavailableError
from hybridnas.hardware import Impl
from hybridnas.kernels import _dispatch
from hybridnas.kernels._build import Library
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels.selective_scan import native

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLOAT, DOUBLE, HALF = (torch.float32,), (torch.float64,), (torch.bfloat16,)
SCAN = Operation(
    "scan",
    "chunk by chunk",
    native=lambda: Library(None, "C, compiled by cc"),
    native_available=lambda: True,
    triton=True,
)
UNCOMPILED = SCAN._replace(native=lambda: Library(None, "no C compiler found"), native_available=lambda: False)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", True)


@pytest.mark.parametrize(
    ("operation", "device", "dtypes", "chosen"),
    [
        (SCAN, CUDA, FLOAT, Impl.TRITON),
        (SCAN, CUDA, HALF, Impl.TRITON),
        (SCAN, CUDA, DOUBLE, Impl.TORCH),
        (SCAN, CPU, FLOAT, Impl.NATIVE),
        (SCAN, CPU, HALF, Impl.NATIVE),
        (SCAN, CPU, FLOAT + DOUBLE, Impl.TORCH),
        (SCAN, torch.device("meta"), FLOAT, Impl.TORCH),
        (UNCOMPILED, CPU, FLOAT, Impl.TORCH),
        (SCAN._replace(auto_triton=False), CUDA, FLOAT, Impl.TORCH),
        (SCAN._replace(triton=False), CUDA, FLOAT, Impl.TORCH),
        (SCAN._replace(native=None), CPU, FLOAT, Impl.TORCH),
    ],
)
def test_auto_is_the_devices_own_form_for_what_it_takes_and_torch_for_the_rest(operation, device, dtypes, chosen):
    assert operation.choose("auto", device, dtypes) is chosen
    assert operation.choose(Impl.AUTO, device, dtypes) is chosen
    for impl in (Impl.REFERENCE, Impl.TORCH):
        assert operation.choose(impl.value, device, dtypes) is impl


def test_a_size_that_a_form_does_not_take_sends_auto_to_torch_and_refuses_the_name():
    limits = {"native_limit": "takes at most 16 taps", "triton_limit": "takes at most 8 taps"}
    assert SCAN.choose("auto", CPU, FLOAT, **limits) is Impl.TORCH
    assert SCAN.choose("auto", CUDA, FLOAT, **limits) is Impl.TORCH
    with pytest.raises(KernelUnavailableError, match=r"^scan impl='native' takes at most 16 taps; use impl='auto'$"):
        SCAN.choose("native", CPU, FLOAT, **limits)
    with pytest.raises(KernelUnavailableError, match=r"^scan impl='triton' takes at most 8 taps; use impl='auto'$"):
        SCAN.choose("triton", CUDA, FLOAT, **limits)


@pytest.mark.parametrize(
    ("operation", "impl", "device", "dtypes", "allowed"),
    [
        (SCAN, "native", CUDA, FLOAT, ["auto", "reference", "torch", "triton"]),
        (SCAN, "native", CPU, DOUBLE, ["auto", "reference", "torch"]),
        (UNCOMPILED, "native", CPU, FLOAT, ["auto", "reference", "torch"]),
        (SCAN._replace(native=None), "native", CPU, FLOAT, ["auto", "reference", "torch"]),
        (SCAN, "triton", CPU, FLOAT, ["auto", "reference", "torch", "native"]),
        (SCAN, "triton", CUDA, DOUBLE, ["auto", "reference", "torch"]),
        (SCAN._replace(triton=False), "triton", CUDA, FLOAT, ["auto", "reference", "torch"]),
    ],
)
def test_a_named_implementation_that_cannot_run_is_refused_with_those_that_can(
    operation, impl, device, dtypes, allowed
):
    with pytest.raises(KernelUnavailableError) as refused:
        operation.choose(impl, device, dtypes)
    assert (refused.value.field, refused.value.got, refused.value.allowed) == ("impl", impl, allowed)


def test_without_a_cuda_device_triton_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = r"^scan impl='triton' needs a CUDA device, this machine has none; use impl='auto'$"
    with pytest.raises(KernelUnavailableError, match=words):
        SCAN.choose("triton", CPU, FLOAT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(KernelUnavailableError, match=r"needs a CUDA device, this tensor is on 'cpu'; use impl='auto'$"):
        SCAN.choose("triton", CPU, FLOAT)


def test_the_interpreter_takes_tensors_of_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert SCAN.choose("triton", CPU, FLOAT) is Impl.TRITON
    assert SCAN.choose("auto", CPU, FLOAT) is Impl.NATIVE


def test_without_the_package_auto_is_torch_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    assert SCAN.choose("auto", CUDA, FLOAT) is Impl.TORCH
    with pytest.raises(KernelUnavailableError, match="scan impl='triton' needs the package triton, which is not inst"):
        SCAN.choose("triton", CUDA, FLOAT)
    assert SCAN.describe("cuda") == "torch: chunk by chunk (triton needs the package triton, which is not installed)"


def test_an_unknown_name_is_a_wrong_setting():
    with pytest.raises(ConfigError) as refused:
        SCAN.choose("gpu", CPU, FLOAT)
    assert refused.value.allowed == [impl.value for impl in Impl]


def test_describe_says_what_choose_takes():
    assert SCAN.describe("cuda") == "triton: tuned at the first call, the choice is cached"
    assert SCAN.describe("cpu") == "native: C, compiled by cc"
    assert SCAN.describe("cuda", torch.float64) == (
        "torch: chunk by chunk (triton takes float32, bfloat16, float16, got float64)"
    )
    assert UNCOMPILED.describe("cpu") == "torch: chunk by chunk (native is not compiled: no C compiler found)"
    assert SCAN.describe("cpu", impl="torch") == "torch: chunk by chunk"
    assert SCAN.describe("cpu", impl="reference") == "reference: step by step"
    with pytest.raises(KernelUnavailableError):
        SCAN.describe("cpu", torch.float64, impl="native")


def test_dtypes_are_those_of_the_tensors_that_are_given():
    assert dtypes_of(torch.zeros(1, dtype=torch.float64), None, torch.zeros(1, dtype=torch.bfloat16)) == DOUBLE + HALF


def test_an_operation_without_a_form_chooses_by_itself_in_a_model_of_that_form():
    assert SCAN.nearest("native") is Impl.NATIVE
    assert SCAN._replace(native=None).nearest("native") is Impl.AUTO
    assert SCAN._replace(triton=False).nearest("triton") is Impl.AUTO
    assert SCAN._replace(native=None, triton=False).nearest("torch") is Impl.TORCH


@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("native", marks=needs_compiler)])
def test_a_model_of_every_implementation_has_the_logits_the_loss_and_the_tokens_of_auto(impl):
    ids = torch.arange(22).reshape(2, 11) % 7
    fields = {"n_experts": 2, "d_expert": 8, "d_state": 4}
    auto, named = (
        hybridnas.build("MNAFE", d_model=16, vocab_size=7, impl=name, **fields).eval() for name in ("auto", impl)
    )
    with torch.no_grad():
        expected, got = auto(ids, labels=ids), named(ids, labels=ids)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.loss, expected.loss)
        tokens = [model.generate(ids[:, :3], max_new_tokens=4, temperature=0) for model in (auto, named)]
    assert torch.equal(*tokens)
    words = named.implementations()
    assert words["mamba"]["selective_scan"].startswith(impl)
    assert words["mamba2"]["ssd"].startswith("torch" if impl == "native" else impl)


def test_a_gpu_that_triton_does_not_support_is_refused_by_name_and_left_to_torch_by_auto(monkeypatch):
    operation = Operation("scan", "chunks", triton=True)
    device, dtypes = torch.device("cuda"), (torch.float32,)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert operation.choose("auto", device, dtypes) is Impl.TORCH
    with pytest.raises(KernelUnavailableError) as caught:
        operation.choose("triton", device, dtypes)
    assert (caught.value.field, caught.value.got) == ("impl", "triton")
    assert "triton" not in caught.value.allowed
    assert "compute capability 8.0 or more, Tesla T4 has 7.5" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert operation.choose("auto", device, dtypes) is Impl.TRITON
