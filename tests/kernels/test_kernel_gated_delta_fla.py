"""flash-linear-attention behind our function: how its functions are called, by stand-ins that compute the reference."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.hardware import Impl
from hybridnas.kernels import _dispatch
from hybridnas.kernels.gated_delta import OPERATION, gated_delta
from hybridnas.kernels.gated_delta.fla import gated_delta_fla
from hybridnas.kernels.gated_delta.reference import Inputs, gated_delta_reference

B, L, G, H, K, V = 2, 7, 1, 2, 3, 4
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4]])


@pytest.fixture
def calls(monkeypatch):
    """Put stand-ins for ``fla.ops`` in place, and return the name of each call with its arguments."""
    made = []

    def stand_in(name):
        def function(
            q, k, v, g=None, beta=None, *, scale, initial_state, output_final_state, cu_seqlens=None
        ):  # like the package: one row of documents, a state for each
            made.append((name, {"g": g, "beta": beta, "cu_seqlens": cu_seqlens}))
            assert output_final_state and q.shape[2] == k.shape[2] == v.shape[2]
            if cu_seqlens is None:
                return gated_delta_reference(Inputs(q, k, v, g, beta, initial_state, None, scale))
            assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64
            outputs, finals = [], []
            for i, (start, end) in enumerate(pairwise(cu_seqlens)):
                own = [None if t is None else t[:, start:end] for t in (q, k, v, g, beta)]
                state = None if initial_state is None else initial_state[i : i + 1]
                o, final = gated_delta_reference(Inputs(*own, state, None, scale))
                outputs.append(o)
                finals.append(final)
            return torch.cat(outputs, 1), torch.cat(finals)

        return function

    functions = {"delta_rule": "chunk_delta_rule", "gated_delta_rule": "chunk_gated_delta_rule", "kda": "chunk_kda"}
    functions |= {"simple_gla": "chunk_simple_gla", "gla": "chunk_gla"}
    for module, name in functions.items():
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", SimpleNamespace(**{name: stand_in(name)}))
    return made


CASES = [
    (None, True, "chunk_delta_rule"),
    ((H,), True, "chunk_gated_delta_rule"),
    ((B, L, H), True, "chunk_gated_delta_rule"),
    ((B, L, H, K), True, "chunk_kda"),
    (None, False, "chunk_simple_gla"),
    ((H,), False, "chunk_simple_gla"),
    ((B, L, H), False, "chunk_simple_gla"),
    ((B, L, H, K), False, "chunk_gla"),
]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("decay", "delta", "name"), CASES)
def test_each_variant_is_one_function_whose_arguments_mean_the_same(calls, decay, delta, name, documents):
    make = torch.Generator().manual_seed(0)
    shapes = [(B, L, G, K), (B, L, G, K), (B, L, H, V), decay, (B, L, H) if delta else None, (B, H, K, V)]
    values = [None if s is None else torch.randn(s, generator=make) for s in shapes]
    if decay is not None:
        values[3] = -values[3].abs()
    leaves = [v.requires_grad_() for v in values if v is not None]
    inputs = Inputs(*values, IDS if documents else None, 0.3)
    got, wanted = gated_delta_fla(inputs), gated_delta_reference(inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    loss, right = (o.square().sum() + final.square().sum() for o, final in (got, wanted))
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    ((called, arguments),) = calls
    assert called == name and (arguments["g"] is None) == (decay is None)
    if documents:
        assert arguments["cu_seqlens"].tolist() == [0, 2, 5, 7, 14]


def test_it_is_named_never_chosen_and_refused_where_it_cannot_run(monkeypatch):
    cuda, cpu, half = torch.device("cuda"), torch.device("cpu"), (torch.bfloat16,)
    monkeypatch.setattr(_dispatch, "_FLA_INSTALLED", True)
    assert OPERATION.choose("fla", cuda, half) is Impl.FLA
    assert OPERATION.choose("auto", cuda, half) is not Impl.FLA
    assert OPERATION.describe(cuda, torch.bfloat16, "fla") == "fla: flash-linear-attention's kernels"
    assert OPERATION._replace(fla=False).nearest("fla") is Impl.AUTO and OPERATION.nearest("fla") is Impl.FLA
    words = "gated_delta impl='fla' needs the package flash-linear-attention: pip install"
    monkeypatch.setattr(_dispatch, "_FLA_INSTALLED", False)
    with pytest.raises(KernelUnavailableError, match=words) as refused:
        OPERATION.choose("fla", cuda, half)
    assert (refused.value.field, refused.value.got) == ("impl", "fla") and "fla" not in refused.value.allowed
    with pytest.raises(KernelUnavailableError, match="gated_delta impl='fla' needs a CUDA device"):
        OPERATION.choose("fla", cpu, half)
    with pytest.raises(KernelUnavailableError, match="impl='fla' does not exist"):
        OPERATION._replace(fla=False).choose("fla", cuda, half)


def test_float32_is_refused_before_the_package_is_asked(monkeypatch):
    monkeypatch.setattr(_dispatch, "_FLA_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    limit = {"fla_limit": "takes q, k and v all in bfloat16 or all in float16"}
    with pytest.raises(KernelUnavailableError, match="takes q, k and v all in bfloat16") as refused:
        OPERATION.choose("fla", torch.device("cuda"), (torch.float32,), **limit)
    assert refused.value.allowed == ["auto", "reference", "torch", "triton"]
    with pytest.raises(KernelUnavailableError, match="needs a CUDA device"):
        gated_delta(*(torch.zeros(1, 2, 1, 2) for _ in range(3)), impl="fla")
