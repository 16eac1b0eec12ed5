"""Which form an operation takes on which device, and the words with which Triton is refused; nothing here needs it."""

import pytest
import torch

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d, selective_scan
from hybridnas.kernels._triton import choose as room
from hybridnas.kernels._triton.choose import choose, require_dtypes, takes_dtypes

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(room, "_INSTALLED", True)


def test_auto_is_triton_on_cuda_for_what_it_takes_and_torch_for_the_rest():
    assert choose("scan", "auto", CUDA, takes=True) is Impl.TRITON
    assert choose("scan", "auto", CUDA, takes=False) is Impl.CPU
    assert choose("scan", "auto", CPU, takes=True) is Impl.CPU
    assert choose("scan", "reference", CUDA, takes=True) is Impl.REFERENCE
    assert choose("scan", "cpu", CUDA, takes=True) is Impl.CPU
    assert choose("scan", "triton", CUDA, takes=False) is Impl.TRITON  # which then says what it does not take


def test_without_a_cuda_device_triton_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = r"^scan impl='triton' needs a CUDA device, this machine has none; use impl='cpu'$"
    with pytest.raises(KernelUnavailableError, match=words):
        choose("scan", "triton", CPU, takes=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(KernelUnavailableError, match=r"needs a CUDA device, this tensor is on 'cpu'; use impl='cpu'$"):
        choose("scan", "triton", CPU, takes=True)


def test_the_interpreter_takes_tensors_of_a_processor(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("scan", "triton", CPU, takes=True) is Impl.TRITON
    assert choose("scan", "auto", CPU, takes=True) is Impl.CPU


def test_without_the_package_auto_is_torch_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(room, "_INSTALLED", False)
    assert choose("scan", "auto", CUDA, takes=True) is Impl.CPU
    with pytest.raises(KernelUnavailableError, match="scan impl='triton' needs the package triton; install it or use"):
        choose("scan", "triton", CUDA, takes=True)
    assert selective_scan.describe("cuda") == (
        "torch, chunked: the package triton is not installed; install it to run faster"
    )


def test_double_precision_is_not_for_triton():
    double = torch.zeros(1, dtype=torch.float64)
    assert takes_dtypes(torch.zeros(1), None, torch.zeros(1, dtype=torch.bfloat16))
    assert not takes_dtypes(torch.zeros(1), double)
    with pytest.raises(KernelInputError, match=r"^scan impl='triton' takes .* float16, u is torch.float64; use impl="):
        require_dtypes("scan", delta=torch.zeros(1), u=double)


def test_describe_says_what_runs_on_cuda():
    assert selective_scan.describe("cuda") == (
        "Triton, tuned at the first call (choice cached); torch, chunked, for float64"
    )
    assert causal_conv1d.describe("cuda") == (
        "Triton, tuned at the first call (choice cached); torch, F.conv1d, for float64"
    )
