"""H3 against its algorithm in float64: the shift matrix, all states with their conjugates, and a loop over time."""

import pytest
import torch
from oracles import randomize, relative

from hybridnas.blocks.h3 import H3
from hybridnas.errors import ConfigError


def paper(block, x):
    """Return the block's output by algorithm 1 of arXiv 2212.14052, both state spaces as recurrences."""
    size, heads = block.config.head_dim, block.config.width // block.config.head_dim
    A, C = -block.ssm.log_A_real.exp(), block.ssm.C
    if block.ssm.A_imag is not None:
        A, C = torch.complex(A, block.ssm.A_imag), torch.view_as_complex(C)
        A, C = torch.cat([A, A.conj()], 1), torch.cat([C, C.conj()], 1)
    dt = block.ssm.log_dt.exp()[:, None]
    decay, drive = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    taps = block.config.d_conv
    matrix = torch.diag(torch.ones(taps - 1, dtype=x.dtype), -1)  # the shift matrix, section 3.1
    c_shift = block.conv1d.weight[:, 0].flip(-1)
    q, k, v = block.in_proj(x).chunk(3, -1)
    state = x.new_zeros(x.shape[0], k.shape[-1], taps)
    memory = torch.zeros(x.shape[0], heads, size, size, A.shape[1], dtype=A.dtype)
    ys = []
    for t in range(x.shape[1]):
        state = state @ matrix.T
        state = torch.cat([state[..., :1] + k[:, t, :, None], state[..., 1:]], -1)
        key = (state * c_shift).sum(-1).unflatten(-1, (heads, size))
        u = key[..., :, None] * v[:, t].unflatten(-1, (heads, size))[..., None, :]
        memory = decay[:, None, None] * memory + (drive[:, None, None] * u[..., None])
        y = (C[:, None, None] * memory).sum(-1)
        y = (y.real if y.is_complex() else y) + block.ssm.D[:, None, None] * u
        ys.append((q[:, t].unflatten(-1, (heads, 1, size)) @ y).flatten(1))
    return block.out_proj(torch.stack(ys, 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"d_state": 8, "d_conv": 5},
        {"d_state": 6, "init": "inv", "d_conv": 3, "head_dim": 4},
        {"d_state": 5, "init": "real", "d_conv": 1, "d_inner": 10, "bias": False},
    ],
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-5), (torch.float64, 1e-11)])
def test_outputs_and_gradients_are_those_of_the_papers_algorithm(fields, dtype, most):
    torch.manual_seed(0)
    ours, true = (H3(H3.Config(d_model=12, **fields)) for _ in range(2))
    randomize(ours, std=0.1)
    true.load_state_dict(ours.state_dict())
    x = torch.randn(2, 80, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(2, 80, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for block, run in ((ours.to(dtype), lambda b, x: b(x).y_BLD), (true.double(), paper)):
        own = x.to(next(block.parameters()).dtype).requires_grad_()
        y = run(block, own)
        found.append((y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), [own, *block.parameters()])))
    assert max(relative(got, expected) for got, expected in zip(*found, strict=True)) <= most


def test_heads_must_divide_the_channels():
    with pytest.raises(ConfigError) as caught:
        H3.Config(d_model=12, head_dim=5)
    assert (caught.value.field.rpartition(".")[2], caught.value.got) == ("head_dim", 5)
