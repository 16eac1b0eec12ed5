"""S4D against the paper's equations in float64: all N states, conjugates included, zero-order hold, step by step."""

import math

import pytest
import torch
from oracles import randomize, relative
from torch.nn import functional as F

from hybridnas.blocks.s4d import S4d
from hybridnas.errors import ConfigError


def paper(block, x_BLD):
    """Return the block's output by equations 2 to 4 of arXiv 2206.11893 with B of ones, and one loop over time."""
    A, C = -block.ssm.log_A_real.exp(), block.ssm.C
    if block.ssm.A_imag is not None:
        A, C = torch.complex(A, block.ssm.A_imag), torch.view_as_complex(C)
        A, C = torch.cat([A, A.conj()], 1), torch.cat([C, C.conj()], 1)
    dt = block.ssm.log_dt.exp()[:, None]
    decay, drive = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    u_BLI = x_BLD if block.in_proj is None else block.in_proj(x_BLD)
    h, ys = torch.zeros(x_BLD.shape[0], *A.shape, dtype=A.dtype), []
    for u_BI in u_BLI.unbind(1):
        h = decay * h + drive * u_BI[..., None]
        y = (C * h).sum(-1)
        if y.is_complex():
            assert y.imag.abs().max() < 1e-12  # pairs: real without taking a real part
            y = y.real
        ys.append(y + block.ssm.D * u_BI)
    act = F.silu if block.config.activation == "silu" else F.gelu
    y_BLD = block.out_proj(act(torch.stack(ys, 1)))
    return F.glu(y_BLD, -1) if block.config.glu else y_BLD


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "lin"},
        {"init": "inv", "d_state": 6, "d_inner": 10},
        {"init": "real", "activation": "silu", "glu": False},
    ],
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-5), (torch.float64, 1e-11)])
def test_outputs_and_gradients_are_those_of_the_papers_recurrence(fields, dtype, most):
    torch.manual_seed(0)
    ours, true = (S4d(S4d.Config(d_model=12, **fields)) for _ in range(2))
    randomize(ours, std=0.1)
    true.load_state_dict(ours.state_dict())
    ours, true = ours.to(dtype), true.double()
    x = torch.randn(2, 150, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(2, 150, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for block, run in ((ours, lambda b, x: b(x).y_BLD), (true, paper)):
        own = x.to(next(block.parameters()).dtype).requires_grad_()
        y = run(block, own)
        found.append((y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), [own, *block.parameters()])))
    assert max(relative(got, expected) for got, expected in zip(*found, strict=True)) <= most


def test_initial_states_are_the_papers():
    for init, expected in {
        "lin": [complex(-0.5, math.pi * n) for n in range(4)],
        "inv": [complex(-0.5, 8 / math.pi * (8 / (2 * n + 1) - 1)) for n in range(4)],
        "real": [complex(-(n + 1), 0) for n in range(8)],
    }.items():
        block = S4d(S4d.Config(d_model=2, d_state=8, init=init))
        A = -block.ssm.log_A_real.exp()
        A = torch.complex(A, torch.zeros_like(A) if block.ssm.A_imag is None else block.ssm.A_imag)
        torch.testing.assert_close(A, torch.tensor([expected] * 2), rtol=1e-6, atol=1e-6)
        dt = S4d(S4d.Config(d_model=500, init=init)).ssm.log_dt.exp()
        assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1


def test_an_odd_number_of_complex_states_is_refused():
    with pytest.raises(ConfigError) as caught:
        S4d.Config(d_model=8, d_state=5)
    assert (caught.value.field.rpartition(".")[2], caught.value.got) == ("d_state", 5)
    assert S4d.Config(d_model=8, d_state=5, init="real").cost(8).state_bytes == 8 * 5 * 4
